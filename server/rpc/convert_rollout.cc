#include <cmath>
#include <utility>

#include "kernels/base/status_macros.h"
#include "server/rpc/convert.h"
#include "server/rpc/field_check.h"

namespace coppice {
namespace {

// A sample may have no tokens: one that was ended before its first is kept with its group.
absl::Status SetSample(const v1::RolloutSample& sample, int64_t max_tokens, int64_t vocab,
                       RolloutSample& out) {
  const auto& ids = sample.token_ids();
  const auto& logprobs = sample.sampler_logprobs();
  RETURN_IF_ERROR(CheckRange("token_ids.size", ids.size(), 0, max_tokens));
  RETURN_IF_ERROR(CheckTokenIds("token_ids", absl::MakeConstSpan(ids.data(), ids.size()), vocab));
  RETURN_IF_ERROR(CheckRange("sampler_logprobs.size", logprobs.size(), ids.size(), ids.size()));
  RETURN_IF_ERROR(
      CheckFinite("sampler_logprobs", absl::MakeConstSpan(logprobs.data(), logprobs.size())));
  out.tokens.assign(ids.begin(), ids.end());
  out.sampler_logprobs.assign(logprobs.begin(), logprobs.end());
  return absl::OkStatus();
}

absl::StatusOr<Rollout> ToNative(const v1::Rollout& proto, const RequestLimits& limits) {
  Rollout out;
  const auto& prompt = proto.prompt().ids();
  RETURN_IF_ERROR(CheckRange("prompt.size", prompt.size(), 1, limits.max_context - 1));
  RETURN_IF_ERROR(
      CheckTokenIds("prompt", absl::MakeConstSpan(prompt.data(), prompt.size()), limits.vocab));
  out.prompt.assign(prompt.begin(), prompt.end());
  RETURN_IF_ERROR(CheckRange("samples.size", proto.samples_size(), 1, limits.max_group_size));
  const int64_t room = limits.max_context - static_cast<int64_t>(prompt.size());
  for (int i = 0; i < proto.samples_size(); ++i) {
    const absl::Status status =
        SetSample(proto.samples(i), room, limits.vocab, out.samples.emplace_back());
    if (!status.ok()) return At(absl::StrCat("samples[", i, "]."), status);
  }
  if (!(std::isfinite(proto.temperature()) && proto.temperature() > 0)) {
    return InvalidField("temperature", "a finite number > 0", proto.temperature());
  }
  out.temperature = proto.temperature();
  out.oldest_version = PolicyVersion{proto.oldest_policy_version()};
  return out;
}

}  // namespace

absl::Status CheckRolloutId(absl::string_view id) {
  if (id.empty()) return InvalidField("rollout_id", "an id", "an empty one");
  return CheckName("rollout_id", id);
}

absl::StatusOr<Rollout> FromProto(const v1::PutRolloutRequest& proto, const Tenant& tenant,
                                  const RequestLimits& limits) {
  RETURN_IF_ERROR(CheckRolloutId(proto.rollout_id()));
  absl::StatusOr<Rollout> rollout = ToNative(proto.rollout(), limits);
  if (!rollout.ok()) return At("rollout.", rollout.status());
  rollout->tenant_salt = tenant.salt;
  return rollout;
}

void ToProto(const Rollout& rollout, v1::Rollout* proto) {
  proto->mutable_prompt()->mutable_ids()->Add(rollout.prompt.begin(), rollout.prompt.end());
  for (const RolloutSample& sample : rollout.samples) {
    v1::RolloutSample* out = proto->add_samples();
    out->mutable_token_ids()->Add(sample.tokens.begin(), sample.tokens.end());
    out->mutable_sampler_logprobs()->Add(sample.sampler_logprobs.begin(),
                                         sample.sampler_logprobs.end());
  }
  proto->set_temperature(rollout.temperature);
  proto->set_oldest_policy_version(Raw(rollout.oldest_version));
}

}  // namespace coppice
