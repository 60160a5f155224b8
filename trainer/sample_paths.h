// From unique tokens to samples and back: every sample gathers the log-probs of its own path,
// evaluates its own loss terms, and its derivatives are added up per unique token.
//
// A path may lie in two trees, a prompt's and a branch's: each token is found in one of them. Host
// only; sums in double and in sample order.
#pragma once

#include <vector>

#include "absl/types/span.h"
#include "trainer/backward.h"
#include "trainer/forward.h"
#include "trainer/loss.h"
#include "trainer/request_plan.h"
#include "trainer/token_tree.h"
#include "trainer/train_types.h"

namespace coppice {

// Derivatives by unique token of one tree.
class HeadGradientSums {
 public:
  explicit HeadGradientSums(const TokenTree& tree)
      : d_logprobs_(tree.targets.size()), d_entropy_(tree.num_head_rows()) {}

  void Add(const std::vector<TargetRef>& refs, const SampleGradient& gradient);
  // Times `scale`.
  HeadGradients Round(bool with_entropy, double scale) const;

 private:
  std::vector<double> d_logprobs_, d_entropy_;
};

// A tree in which tokens of the samples are found: sample i of those evaluated is sample
// first + i of the tree.
struct PathSource {
  const TokenTree& tree;
  const HeadOutputs& head;
  size_t first = 0;
  HeadGradientSums* sums = nullptr;  // null when scoring
};

// Log-probs and entropies of one sample; zero where no log-prob was wanted.
struct SamplePath {
  std::vector<float> logprobs;
  std::vector<float> entropy;
};
SamplePath GatherPath(absl::Span<const PathSource> sources, size_t i);

// Loss terms of `samples` (indices into the plan): results, totals, and the sources' sums.
void EvaluateLoss(const ForwardBackwardRequest& request, const RequestPlan& plan,
                  const std::vector<int32_t>& samples, absl::Span<const PathSource> sources,
                  LossSums& sums, std::vector<SampleResult>& results);

}  // namespace coppice
