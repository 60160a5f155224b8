// Rollouts: finished groups kept for TrainStep, so that a controller sends rewards only: those
// generated here, and those that another daemon generated and somebody put here. At most `capacity`
// of both kinds; the oldest goes first. A tenant sees its own ids only. Owner and thread: the
// engine thread.
//
// Sampler log-probs are those of the distribution at the sampling temperature (1 for greedy) before
// logit bias and truncation: what the trainer's own log-prob at that temperature equals up to
// rounding, so that truncated importance sampling compares like with like. A step with another loss
// temperature is therefore refused.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/ids.h"
#include "server/engine/engine.h"

namespace coppice {

class Rollouts {
 public:
  // `nonce` makes ids of different runs of the daemon differ.
  Rollouts(int64_t capacity, uint64_t nonce) : capacity_(capacity), nonce_(nonce) {}

  // Under an id of its own.
  std::string Add(Rollout rollout);
  // Under an id of the caller's. Equal content again changes nothing, also not its age.
  // ALREADY_EXISTS: other content.
  absl::Status Put(const std::string& id, Rollout rollout);
  // A copy. NOT_FOUND (unknown, dropped or another tenant's).
  absl::StatusOr<Rollout> Get(const std::string& id, const std::string& tenant_salt) const;
  // For weights of another history, with which versions cannot be compared.
  void Clear();
  int64_t size() const { return static_cast<int64_t>(by_id_.size()); }

  // Whether Resolve would succeed. NOT_FOUND as Get,
  // FAILED_PRECONDITION (older than max_policy_lag), INVALID_ARGUMENT (sample index, temperature,
  // shapes).
  absl::Status Check(const TrainStepRequest& request, PolicyVersion current) const;
  // Replaces references by tokens and log-probs. A rollout of an older policy supplies its sampler
  // log-probs as old ones too; of the current policy none, so that the ratio is exactly 1. A
  // prompt's kept state goes with it. What the request itself gives is kept. Errors as Check; then
  // nothing has changed.
  absl::Status Resolve(TrainStepRequest& request, PolicyVersion current) const;

 private:
  using Key = std::pair<std::string, std::string>;  // tenant_salt, id

  const Rollout* Find(const std::string& id, const std::string& tenant_salt) const;
  absl::Status NotFound(absl::string_view where) const;
  void Keep(Key key, Rollout rollout);
  absl::Status CheckGroup(const TrainStepRequest& request, size_t group,
                          PolicyVersion current) const;

  const int64_t capacity_;
  const uint64_t nonce_;
  uint64_t next_ = 0;
  absl::flat_hash_map<Key, Rollout> by_id_;
  std::deque<Key> order_;  // oldest first
};

}  // namespace coppice
