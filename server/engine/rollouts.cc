#include "server/engine/rollouts.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"

namespace coppice {

std::string Rollouts::Add(Rollout rollout) {
  Key key(rollout.tenant_salt, "");
  do {
    key.second = absl::StrFormat("rollout-%016x-%d", nonce_, next_++);
  } while (by_id_.contains(key));  // somebody may have put one under such an id
  std::string id = key.second;
  Keep(std::move(key), std::move(rollout));
  return id;
}

absl::Status Rollouts::Put(const std::string& id, Rollout rollout) {
  const Rollout* kept = Find(id, rollout.tenant_salt);
  if (kept == nullptr) {
    Key key(rollout.tenant_salt, id);
    Keep(std::move(key), std::move(rollout));
    return absl::OkStatus();
  }
  if (kept->prompt == rollout.prompt && kept->samples == rollout.samples &&
      kept->temperature == rollout.temperature && kept->oldest_version == rollout.oldest_version) {
    return absl::OkStatus();
  }
  return absl::AlreadyExistsError(absl::StrCat(
      "rollout not kept: ", id, ": want an id that is new or the content that is kept under it, ",
      "got other content; put it under another id"));
}

absl::StatusOr<Rollout> Rollouts::Get(const std::string& id, const std::string& tenant_salt) const {
  const Rollout* rollout = Find(id, tenant_salt);
  if (rollout != nullptr) return *rollout;
  return NotFound(absl::StrCat("rollout ", id));
}

const Rollout* Rollouts::Find(const std::string& id, const std::string& tenant_salt) const {
  const auto it = by_id_.find(Key(tenant_salt, id));
  return it == by_id_.end() ? nullptr : &it->second;
}

absl::Status Rollouts::NotFound(absl::string_view where) const {
  return absl::NotFoundError(
      absl::StrCat(where, ": not among the retained ones; generate with retain and train before ",
                   capacity_, " newer ones"));
}

void Rollouts::Keep(Key key, Rollout rollout) {
  order_.push_back(std::move(key));
  by_id_[order_.back()] = std::move(rollout);
  if (size() > capacity_) {
    by_id_.erase(order_.front());
    order_.pop_front();
  }
}

void Rollouts::Clear() {
  by_id_.clear();
  order_.clear();
}

absl::Status Rollouts::Check(const TrainStepRequest& request, PolicyVersion current) const {
  if (request.rollout_ids.empty()) return absl::OkStatus();
  const size_t groups = request.batch.groups.size();
  if (request.rollout_ids.size() != groups || request.rollout_samples.size() != groups) {
    return absl::InvalidArgumentError(absl::StrCat(
        "train step: rollout ids: want one per group, ", groups, ", got ",
        request.rollout_ids.size(), " ids and ", request.rollout_samples.size(), " sample lists"));
  }
  for (size_t g = 0; g < groups; ++g) {
    if (!request.rollout_ids[g].empty()) RETURN_IF_ERROR(CheckGroup(request, g, current));
  }
  return absl::OkStatus();
}

absl::Status Rollouts::CheckGroup(const TrainStepRequest& request, size_t g,
                                  PolicyVersion current) const {
  const std::string& id = request.rollout_ids[g];
  const std::string where = absl::StrCat("train step: group ", g, ": rollout ", id);
  const Rollout* rollout = Find(id, request.tenant_salt);
  if (rollout == nullptr) return NotFound(where);
  // A version that went back (a loaded checkpoint) counts as infinitely far.
  const uint64_t lag = Raw(current) - Raw(rollout->oldest_version);
  if (lag > static_cast<uint64_t>(request.max_policy_lag)) {
    return absl::FailedPreconditionError(
        absl::StrCat(where, ": want a policy lag of at most ", request.max_policy_lag,
                     ", got version ", Raw(rollout->oldest_version), " under version ",
                     Raw(current), "; generate again or raise max_policy_lag"));
  }
  if (rollout->temperature != request.batch.loss.temperature) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": loss temperature: want ", rollout->temperature,
                     " as sampled (greedy counts as 1), got ", request.batch.loss.temperature));
  }
  const std::vector<int32_t>& indices = request.rollout_samples[g];
  const size_t samples = request.batch.groups[g].samples.size();
  if (indices.size() != samples) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": want one sample index per sample, ",
                                                   samples, ", got ", indices.size()));
  }
  for (const int32_t index : indices) {
    if (index >= 0 && index < static_cast<int64_t>(rollout->samples.size())) continue;
    return absl::InvalidArgumentError(absl::StrCat(where, ": sample index: want 0 to ",
                                                   rollout->samples.size() - 1, ", got ", index));
  }
  return absl::OkStatus();
}

absl::Status Rollouts::Resolve(TrainStepRequest& request, PolicyVersion current) const {
  RETURN_IF_ERROR(Check(request, current));
  for (size_t g = 0; g < request.rollout_ids.size(); ++g) {
    if (request.rollout_ids[g].empty()) continue;
    const Rollout& rollout = *Find(request.rollout_ids[g], request.tenant_salt);
    TrainGroup& group = request.batch.groups[g];
    group.prompt = rollout.prompt;
    group.kept_prompt = rollout.kept_prompt.lock();
    for (size_t s = 0; s < group.samples.size(); ++s) {
      const RolloutSample& from = rollout.samples[request.rollout_samples[g][s]];
      TrainSample& to = group.samples[s];
      to.tokens = from.tokens;
      if (to.sampler_logprobs.empty()) to.sampler_logprobs = from.sampler_logprobs;
      if (to.old_logprobs.empty() && rollout.oldest_version != current) {
        to.old_logprobs = from.sampler_logprobs;
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace coppice
