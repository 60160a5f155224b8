// RequestPlan: what a request means, worked out before anything runs: sequences, advantages, global
// denominators, and the passes that fit the limits: micro-batches of whole groups, or one group
// that is too large for that or whose prompt was kept, its prompt and then its branches, or one
// group to score behind what the cache holds of its prompt.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/model/model_config.h"
#include "trainer/loss.h"
#include "trainer/prompt_state.h"
#include "trainer/token_tree.h"
#include "trainer/train_types.h"

namespace coppice {

struct PlannedPass {
  int64_t prompt_rows = 0;  // > 0: the prompt runs by itself and the batches hang below it
  std::shared_ptr<const KeptPrompt> kept;  // null, or the state to start from instead of running it
  const CachedPrefix* cached = nullptr;    // null, or what the batches hang below; then no prompt
  // Ascending sample indices of each tree that runs; one without a prompt of its own.
  std::vector<std::vector<int32_t>> batches;
};

// Borrows the groups.
struct RequestPlan {
  std::vector<const TrainSample*> samples;      // all, in request order
  std::vector<TokenSequence> sequences;         // [samples]
  std::vector<std::vector<double>> advantages;  // [samples]; empty for scoring
  LossCounts counts;                            // over all passes
  std::vector<PlannedPass> passes;
  int64_t with_loss = 0;  // response tokens whose mask is not zero

  std::vector<TokenSequence> Sequences(const std::vector<int32_t>& indices) const;
};

// Limits of one pass.
struct PassLimits {
  int64_t max_rows = 0;
  // Rows that a pass, or a micro-batch of branches, is to have at most; more only if it cannot be
  // cut. At most max_rows.
  int64_t pass_rows = 0;
  bool share_prefixes = true;
  bool slow_context = false;  // see Trainer::Options
  // Rows that a micro-batch of branches may have beside the state of a prompt; 0 if the prompt
  // leaves no room. Absent where prompts cannot run apart from their branches.
  std::function<int64_t(int64_t prompt_rows)> max_branch_rows;
  PolicyVersion version{0};  // of kept prompts that may be used
};

// INVALID_ARGUMENT: bad input, or a group that fits no pass, not even cut into branches.
absl::StatusOr<RequestPlan> PlanTraining(const ModelConfig& config, const PassLimits& limits,
                                         const ForwardBackwardRequest& request);
absl::StatusOr<RequestPlan> PlanScoring(const ModelConfig& config, const PassLimits& limits,
                                        const std::vector<TrainGroup>& groups);
// The passes of the same request under other limits. `groups` are the request's.
absl::StatusOr<std::vector<PlannedPass>> PlanTrainingPasses(const RequestPlan& plan,
                                                            const std::vector<TrainGroup>& groups,
                                                            const PassLimits& limits);
absl::StatusOr<std::vector<PlannedPass>> PlanScoringPasses(const RequestPlan& plan,
                                                           const std::vector<TrainGroup>& groups,
                                                           const PassLimits& limits);

}  // namespace coppice
