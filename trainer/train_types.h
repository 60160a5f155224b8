// Native form of the Training service's messages (proto/coppice/v1/training.proto): what a
// controller asks and gets.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/ids.h"

namespace coppice {

struct KeptPrompt;
class KvPool;

// One response. Per-token vectors are empty (= absent) or have tokens.size() entries.
struct TrainSample {
  std::vector<int32_t> tokens;    // the response, at least one token
  std::vector<float> advantages;  // 1 entry, or one per token; empty if `reward` is given
  std::optional<float> reward;
  std::vector<float> old_logprobs;      // default: the update's own, detached (ratio 1)
  std::vector<float> sampler_logprobs;  // for truncated importance sampling and gap statistics
  std::vector<float> ref_logprobs;      // for the KL term
  std::vector<float> loss_mask;         // default 1
  float weight = 1;
};

// KV of leading prompt tokens that generation has left under the current policy: whole blocks, all
// of the prompt but its last token at most. Borrowed; the caller holds the lease.
struct CachedPrefix {
  const KvPool* pool = nullptr;
  std::vector<int32_t> blocks;
  int64_t tokens = 0;
};

// Samples whose rewards are compared. Sharing does not depend on groups: the trie is built over
// everything.
struct TrainGroup {
  std::vector<int32_t> prompt;  // at least one token
  std::vector<TrainSample> samples;
  // What generation kept of the prompt, or null. Used if it is of this prompt and the current
  // policy; then the prompt is not run forward.
  std::shared_ptr<const KeptPrompt> kept_prompt;
  // Read by scoring instead of running these tokens; training needs more than their KV.
  CachedPrefix cached;
};

struct LossConfig {
  enum class Kind {
    kCrossEntropy,
    kImportanceSampling,
    kPpo,
    kGrpo,
    kDapo,
    kDrGrpo,
    kGspo,
    kCispo
  };
  enum class KlEstimator { kNone, kK1, kK2, kK3 };
  enum class Advantage { kGiven, kGroupNormalized, kGroupCentered, kLeaveOneOut };
  enum class Aggregation { kTokenMean, kSeqMeanTokenMean, kSeqMeanTokenSum, kConstant, kSum };

  Kind kind = Kind::kGrpo;
  float clip_low = 0.2f;
  float clip_high = 0.2f;          // DAPO 0.28; CISPO: cap 1 + clip_high
  std::optional<float> clip_dual;  // c > 1: bounds the loss of negative advantages
  KlEstimator kl = KlEstimator::kNone;
  float kl_coef = 0;
  float entropy_coef = 0;
  float temperature = 1;  // of log-probs; the one that the samples were drawn with
  Advantage advantage = Advantage::kGiven;
  Aggregation aggregation = Aggregation::kTokenMean;
  std::optional<double> denominator;  // global; default: of this request
  // Truncated importance sampling: weight min(exp(old - sampler), cap).
  std::optional<float> importance_cap;
};

struct AdamConfig {
  float learning_rate = 0;
  float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
  float weight_decay = 0;
  float grad_clip_norm = 1;  // 0 = no clipping
};

struct TokenStats {
  int64_t flat = 0;                    // rows of separate sequences: prompt + response - 1 each
  int64_t unique = 0;                  // rows run, those whose forward was reused included
  int64_t prompt_forward_skipped = 0;  // rows whose forward was reused
  int64_t with_loss = 0;               // response tokens whose mask is not zero
};

struct SampleResult {
  std::vector<float> logprobs;  // [response tokens], at the loss temperature
  double entropy = 0;           // mean over unmasked response tokens
  double kl = 0;                // mean KL estimate against ref_logprobs
};

struct ForwardBackwardRequest {
  std::vector<TrainGroup> groups;
  LossConfig loss;
  bool return_logprobs = true;
};

struct ForwardBackwardResult {
  double loss = 0;
  // pg_loss, kl_loss, entropy_bonus as aggregated; means over tokens with loss: entropy, kl,
  // approx_kl (old - l), advantage_mean, ratio_{mean,min,max}, clip_{low,high,dual} (fractions),
  // importance_mean, logprob_gap_{mean,max}; reward_mean; passes, micro_batches, recompute (of the
  // layer with least: 0 nothing, 1 elementwise, 2 gate and up too, 3 all of it; a prompt of which
  // only its state was kept is not counted), activation_bytes, gradient_scale (gradient_scale.h;
  // absent where all coefficients are zero).
  // Absent where nothing supplies them.
  std::map<std::string, double> metrics;
  TokenStats tokens;
  // Phase and seconds: build_tree, forward, head, loss, backward.
  std::vector<std::pair<std::string, double>> phases;
  std::vector<SampleResult> samples;  // in request order: groups, then samples
};

struct OptimStepResult {
  PolicyVersion policy_version{0};
  bool skipped = false;
  std::string skip_reason;  // non-finite gradient norm
  double grad_norm = 0;     // before clipping
  double seconds = 0;
};

}  // namespace coppice
