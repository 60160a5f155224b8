// RequestPlan: what a request means, worked out before anything runs: sequences, advantages, global
// denominators, and the passes (micro-batches of whole groups) that fit the limit of rows.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "kernels/model/model_config.h"
#include "trainer/loss.h"
#include "trainer/token_tree.h"
#include "trainer/train_types.h"

namespace coppice {

// Borrows the groups.
struct RequestPlan {
  std::vector<const TrainSample*> samples;      // all, in request order
  std::vector<TokenSequence> sequences;         // [samples]
  std::vector<std::vector<double>> advantages;  // [samples]; empty for scoring
  LossCounts counts;                            // over all passes
  std::vector<std::vector<int32_t>> passes;     // ascending sample indices of each
  int64_t with_loss = 0;                        // response tokens whose mask is not zero

  // Sequences of one pass.
  std::vector<TokenSequence> PassSequences(size_t pass) const;
};

// Limits of one pass.
struct PassLimits {
  int64_t max_rows = 0;
  bool share_prefixes = true;
};

// INVALID_ARGUMENT: bad input, or a group with more unique tokens than a pass may have.
absl::StatusOr<RequestPlan> PlanTraining(const ModelConfig& config, const PassLimits& limits,
                                         const ForwardBackwardRequest& request);
absl::StatusOr<RequestPlan> PlanScoring(const ModelConfig& config, const PassLimits& limits,
                                        const std::vector<TrainGroup>& groups);

}  // namespace coppice
