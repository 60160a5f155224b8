// Rollouts: finished groups kept for TrainStep, so that a controller sends rewards only. At most
// `capacity`; the oldest goes first. Owner and thread: the engine thread.
//
// Sampler log-probs are those of the distribution at the sampling temperature (1 for greedy) before
// logit bias and truncation: what the trainer's own log-prob at that temperature equals up to
// rounding, so that truncated importance sampling compares like with like. A step with another loss
// temperature is therefore refused.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "kernels/base/ids.h"
#include "server/engine/engine.h"
#include "trainer/prompt_state.h"

namespace coppice {

struct RolloutSample {
  std::vector<int32_t> tokens;
  std::vector<float> sampler_logprobs;
};

struct Rollout {
  std::vector<int32_t> prompt;
  std::vector<RolloutSample> samples;
  float temperature = 1;            // of the sampler log-probs
  PolicyVersion oldest_version{0};  // that drew any of its tokens
  std::string tenant_salt;          // of the request that drew it; nobody else may train on it
  std::weak_ptr<const KeptPrompt> kept_prompt;
};

class Rollouts {
 public:
  // `nonce` makes ids of different runs of the daemon differ.
  Rollouts(int64_t capacity, uint64_t nonce) : capacity_(capacity), nonce_(nonce) {}

  std::string Add(Rollout rollout);
  const Rollout* Find(const std::string& id) const;
  // For weights of another history, with which versions cannot be compared.
  void Clear();
  int64_t size() const { return static_cast<int64_t>(by_id_.size()); }

  // Whether Resolve would succeed. NOT_FOUND (unknown, dropped or another tenant's id),
  // FAILED_PRECONDITION (older than max_policy_lag), INVALID_ARGUMENT (sample index, temperature,
  // shapes).
  absl::Status Check(const TrainStepRequest& request, PolicyVersion current) const;
  // Replaces references by tokens and log-probs. A rollout of an older policy supplies its sampler
  // log-probs as old ones too; of the current policy none, so that the ratio is exactly 1. A
  // prompt's kept state goes with it. What the request itself gives is kept. Errors as Check; then
  // nothing has changed.
  absl::Status Resolve(TrainStepRequest& request, PolicyVersion current) const;

 private:
  absl::Status CheckGroup(const TrainStepRequest& request, size_t group,
                          PolicyVersion current) const;

  const int64_t capacity_;
  const uint64_t nonce_;
  uint64_t next_ = 0;
  absl::flat_hash_map<std::string, Rollout> by_id_;
  std::deque<std::string> order_;  // oldest first
};

}  // namespace coppice
