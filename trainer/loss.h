// Policy losses: from the log-probs of one sample to the derivatives of the loss by each log-prob
// and each entropy. Pure host arithmetic in double; knows no tensors, trees or devices.
//
// With l = log-prob under the policy being trained, l_old = under the policy that l is compared
// with (default l itself, detached), r = exp(l - l_old), A = advantage, m = mask. Per token, before
// aggregation:
//   cross_entropy        -A l                                             (A defaults to 1)
//   importance_sampling  -r A; l_old defaults to the sampler's log-probs
//   ppo, grpo, dapo, dr_grpo  -min(r A, clip(r, 1 - low, 1 + high) A); for A < 0 at most -clip_dual
//   A   (Schulman et al.
//                        2017; dual clip Ye et al. 2020)
//   gspo                 the same with r = exp(mean of l - l_old over the sample) (Zheng et al.
//   2025); always aggregated as
//                        seq_mean_token_mean; no dual clip
//   cispo                -detach(clip(r, 1 - low, 1 + high)) A l           (MiniMax 2025)
// l - l_old is clamped to [-20, 20] (gspo: the mean to at most 10), with zero gradient outside, as
// in verl's core_algos. The term is multiplied by the truncated importance weight min(exp(l_old -
// l_sampler), cap), detached. Then are added kl_coef times the KL estimate (k1: l - l_ref; k2: half
// its square; k3: e^d - d - 1 with d = l_ref - l, clamped to
// [-20, 20] and the value to at most 10) and -entropy_coef times the entropy.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "trainer/train_types.h"

namespace coppice {

// Counts over the whole request, all micro-batches: the default denominators.
struct LossCounts {
  double tokens = 0;     // sum of masks
  double sequences = 0;  // samples with a token whose mask is not zero

  void Add(const TrainSample& sample);
};

// One sample as the loss sees it. Borrowed; entries of masked tokens are not read.
struct SampleView {
  const TrainSample& sample;
  absl::Span<const float> logprobs;     // [response tokens] of the policy, at the loss temperature
  absl::Span<const float> entropy;      // [response tokens]
  absl::Span<const double> advantages;  // [1] or [response tokens]
};

struct SampleGradient {
  std::vector<double> d_logprobs;  // [response tokens] dL/dl
  std::vector<double> d_entropy;   // [response tokens] dL/dentropy
};

// Sums over samples, in double; turned into metrics at the end of a request. Token sums are
// weighted by the mask.
struct LossSums {
  double policy_loss = 0, kl_loss = 0, entropy_bonus = 0;  // aggregated as the loss is
  double tokens = 0, entropy = 0, kl = 0, advantage = 0, importance = 0;
  double ratio = 0, ratio_min = 0, ratio_max = 0, log_ratio = 0;
  double clip_low = 0, clip_high = 0, clip_dual = 0;
  double gap_tokens = 0, gap = 0, gap_max = 0;  // |l - l_sampler|
  double rewards = 0, reward = 0;               // samples with a reward, and their sum
  bool has_kl = false, has_importance = false;

  double loss() const { return policy_loss + kl_loss - entropy_bonus; }
  // Finite values only; clip_* are fractions of the tokens with loss.
  std::map<std::string, double> Metrics() const;
};

// Evaluates one sample: adds to `sums` and returns the derivatives. `result` gets the sample's mean
// entropy and KL.
SampleGradient EvaluateSample(const LossConfig& config, const LossCounts& counts,
                              const SampleView& view, LossSums& sums, SampleResult& result);

// The largest |dL/dl| or |dL/dentropy| of a token where ratio and importance weight are 1 and the
// KL gap is at most 1: their size before any log-prob is known.
double LargestCoefficient(const LossConfig& config, const LossCounts& counts,
                          const TrainSample& sample, absl::Span<const double> advantages);

}  // namespace coppice
