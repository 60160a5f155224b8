#include <cmath>
#include <utility>

#include "kernels/base/status_macros.h"
#include "server/rpc/convert.h"
#include "server/rpc/field_check.h"

namespace coppice {
namespace {

absl::Span<const float> Floats(const google::protobuf::RepeatedField<float>& field) {
  return absl::MakeConstSpan(field.data(), field.size());
}

std::vector<float> Copy(const google::protobuf::RepeatedField<float>& field) {
  return {field.begin(), field.end()};
}

absl::Status CheckPositive(absl::string_view field, double value) {
  if (std::isfinite(value) && value > 0) return absl::OkStatus();
  return InvalidField(field, "a finite number > 0", value);
}

absl::Status CheckNotNegative(absl::string_view field, double value) {
  if (std::isfinite(value) && value >= 0) return absl::OkStatus();
  return InvalidField(field, "a finite number >= 0", value);
}

// ---- Loss

absl::StatusOr<LossConfig::Kind> Kind(v1::LossConfig::Kind kind) {
  switch (kind) {
    case v1::LossConfig::CROSS_ENTROPY:
      return LossConfig::Kind::kCrossEntropy;
    case v1::LossConfig::IMPORTANCE_SAMPLING:
      return LossConfig::Kind::kImportanceSampling;
    case v1::LossConfig::PPO:
      return LossConfig::Kind::kPpo;
    case v1::LossConfig::KIND_UNSPECIFIED:
    case v1::LossConfig::GRPO:
      return LossConfig::Kind::kGrpo;
    case v1::LossConfig::DAPO:
      return LossConfig::Kind::kDapo;
    case v1::LossConfig::DR_GRPO:
      return LossConfig::Kind::kDrGrpo;
    case v1::LossConfig::GSPO:
      return LossConfig::Kind::kGspo;
    case v1::LossConfig::CISPO:
      return LossConfig::Kind::kCispo;
    default:
      return InvalidField("kind", "a LossConfig.Kind", static_cast<int>(kind));
  }
}

absl::StatusOr<LossConfig::KlEstimator> KlEstimator(const v1::Kl& kl) {
  switch (kl.estimator()) {
    case v1::Kl::ESTIMATOR_UNSPECIFIED:
      return kl.coef() > 0 ? LossConfig::KlEstimator::kK3 : LossConfig::KlEstimator::kNone;
    case v1::Kl::K1:
      return LossConfig::KlEstimator::kK1;
    case v1::Kl::K2:
      return LossConfig::KlEstimator::kK2;
    case v1::Kl::K3:
      return LossConfig::KlEstimator::kK3;
    default:
      return InvalidField("kl.estimator", "a Kl.Estimator", static_cast<int>(kl.estimator()));
  }
}

absl::StatusOr<LossConfig::Aggregation> Aggregation(v1::LossConfig::Aggregation aggregation,
                                                    LossConfig::Kind kind) {
  using Native = LossConfig::Aggregation;
  switch (aggregation) {
    case v1::LossConfig::AGGREGATION_UNSPECIFIED:
      if (kind == LossConfig::Kind::kGrpo || kind == LossConfig::Kind::kGspo) {
        return Native::kSeqMeanTokenMean;
      }
      return kind == LossConfig::Kind::kDrGrpo ? Native::kSeqMeanTokenSum : Native::kTokenMean;
    case v1::LossConfig::TOKEN_MEAN:
      return Native::kTokenMean;
    case v1::LossConfig::SEQ_MEAN_TOKEN_MEAN:
      return Native::kSeqMeanTokenMean;
    case v1::LossConfig::SEQ_MEAN_TOKEN_SUM:
      return Native::kSeqMeanTokenSum;
    case v1::LossConfig::CONSTANT:
      return Native::kConstant;
    case v1::LossConfig::SUM:
      return Native::kSum;
    default:
      return InvalidField("aggregation", "a LossConfig.Aggregation", static_cast<int>(aggregation));
  }
}

// `rewards`: the request's samples carry rewards.
absl::StatusOr<LossConfig::Advantage> Advantage(v1::LossConfig::Advantage advantage,
                                                LossConfig::Kind kind, bool rewards) {
  using Native = LossConfig::Advantage;
  switch (advantage) {
    case v1::LossConfig::ADVANTAGE_UNSPECIFIED:
      if (!rewards) return Native::kGiven;
      return kind == LossConfig::Kind::kDrGrpo || kind == LossConfig::Kind::kImportanceSampling
                 ? Native::kGroupCentered
                 : Native::kGroupNormalized;
    case v1::LossConfig::GIVEN:
      return Native::kGiven;
    case v1::LossConfig::GROUP_NORMALIZED:
      return Native::kGroupNormalized;
    case v1::LossConfig::GROUP_CENTERED:
      return Native::kGroupCentered;
    case v1::LossConfig::LEAVE_ONE_OUT:
      return Native::kLeaveOneOut;
    default:
      return InvalidField("advantage", "a LossConfig.Advantage", static_cast<int>(advantage));
  }
}

absl::Status SetClip(const v1::Clip& clip, LossConfig& loss) {
  if (loss.kind == LossConfig::Kind::kDapo) loss.clip_high = 0.28f;
  if (clip.has_low()) loss.clip_low = clip.low();
  if (clip.has_high()) loss.clip_high = clip.high();
  if (!(loss.clip_low > 0 && loss.clip_low < 1)) {
    return InvalidField("clip.low", "a number in (0, 1)", loss.clip_low);
  }
  RETURN_IF_ERROR(CheckPositive("clip.high", loss.clip_high));
  if (clip.has_dual()) {
    if (!(std::isfinite(clip.dual()) && clip.dual() > 1)) {
      return InvalidField("clip.dual", "a finite number > 1", clip.dual());
    }
    loss.clip_dual = clip.dual();
  }
  return absl::OkStatus();
}

absl::StatusOr<LossConfig> Loss(const v1::LossConfig& proto, bool rewards) {
  LossConfig loss;
  ASSIGN_OR_RETURN(loss.kind, Kind(proto.kind()));
  RETURN_IF_ERROR(SetClip(proto.clip(), loss));
  RETURN_IF_ERROR(CheckNotNegative("kl.coef", proto.kl().coef()));
  loss.kl_coef = proto.kl().coef();
  ASSIGN_OR_RETURN(loss.kl, KlEstimator(proto.kl()));
  RETURN_IF_ERROR(CheckFinite("entropy_coef", {proto.entropy_coef()}));
  loss.entropy_coef = proto.entropy_coef();
  if (proto.has_temperature()) loss.temperature = proto.temperature();
  RETURN_IF_ERROR(CheckPositive("temperature", loss.temperature));
  ASSIGN_OR_RETURN(loss.advantage, Advantage(proto.advantage(), loss.kind, rewards));
  ASSIGN_OR_RETURN(loss.aggregation, Aggregation(proto.aggregation(), loss.kind));
  if (proto.has_denominator()) {
    RETURN_IF_ERROR(CheckPositive("denominator", proto.denominator()));
    loss.denominator = proto.denominator();
  } else if (loss.aggregation == LossConfig::Aggregation::kConstant) {
    return InvalidField("denominator", "a number > 0 with CONSTANT", "none");
  }
  if (proto.has_importance_cap()) {
    RETURN_IF_ERROR(CheckPositive("importance_cap", proto.importance_cap()));
    loss.importance_cap = proto.importance_cap();
  }
  return loss;
}

// ---- Samples

// The numbers themselves; whether their counts fit the tokens is CheckLengths' question.
absl::Status CheckNumbers(const v1::Sample& sample) {
  RETURN_IF_ERROR(CheckFinite("advantages", Floats(sample.advantages())));
  RETURN_IF_ERROR(CheckFinite("old_logprobs", Floats(sample.old_logprobs())));
  RETURN_IF_ERROR(CheckFinite("sampler_logprobs", Floats(sample.sampler_logprobs())));
  RETURN_IF_ERROR(CheckFinite("ref_logprobs", Floats(sample.ref_logprobs())));
  RETURN_IF_ERROR(CheckAtLeast("loss_mask", Floats(sample.loss_mask()), 0));
  if (sample.has_reward()) RETURN_IF_ERROR(CheckFinite("reward", {sample.reward()}));
  if (sample.has_weight()) RETURN_IF_ERROR(CheckNotNegative("weight", sample.weight()));
  return absl::OkStatus();
}

absl::Status CheckLength(absl::string_view field, int64_t got, int64_t tokens) {
  if (got == 0 || got == tokens) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("none or ", tokens, " numbers, one per response token"),
                      got);
}

absl::Status CheckLengths(const v1::Sample& sample, int64_t tokens) {
  if (sample.advantages_size() > 1 && sample.advantages_size() != tokens) {
    return InvalidField("advantages", absl::StrCat("1 or ", tokens, " numbers"),
                        sample.advantages_size());
  }
  RETURN_IF_ERROR(CheckLength("old_logprobs", sample.old_logprobs_size(), tokens));
  RETURN_IF_ERROR(CheckLength("sampler_logprobs", sample.sampler_logprobs_size(), tokens));
  RETURN_IF_ERROR(CheckLength("ref_logprobs", sample.ref_logprobs_size(), tokens));
  return CheckLength("loss_mask", sample.loss_mask_size(), tokens);
}

// Each sample has what the advantage mode needs, and nothing that contradicts it.
absl::Status CheckCredit(const v1::Sample& sample, const LossConfig& loss) {
  if (loss.advantage != LossConfig::Advantage::kGiven) {
    if (!sample.has_reward()) return InvalidField("reward", "one per sample", "none");
    if (sample.advantages_size() > 0) {
      return InvalidField("advantages", "none beside rewards", sample.advantages_size());
    }
    return absl::OkStatus();
  }
  if (sample.has_reward()) return InvalidField("reward", "none with given advantages", "one");
  if (sample.advantages_size() == 0 && loss.kind != LossConfig::Kind::kCrossEntropy) {
    return InvalidField("advantages", "advantages or a reward", "neither");
  }
  return absl::OkStatus();
}

absl::Status CheckReference(const v1::Sample& sample, const LossConfig& loss) {
  if (loss.kl == LossConfig::KlEstimator::kNone || sample.ref_logprobs_size() > 0) {
    return absl::OkStatus();
  }
  return InvalidField("ref_logprobs", "one per response token with a KL term", "none");
}

TrainSample Numbers(const v1::Sample& sample, const LossConfig& loss) {
  TrainSample out;
  out.advantages = Copy(sample.advantages());
  if (sample.has_reward()) out.reward = sample.reward();
  if (out.advantages.empty() && !out.reward && loss.kind == LossConfig::Kind::kCrossEntropy) {
    out.advantages.assign(1, 1.0f);
  }
  out.old_logprobs = Copy(sample.old_logprobs());
  out.sampler_logprobs = Copy(sample.sampler_logprobs());
  out.ref_logprobs = Copy(sample.ref_logprobs());
  out.loss_mask = Copy(sample.loss_mask());
  if (sample.has_weight()) out.weight = sample.weight();
  return out;
}

// Tokens from the message.
absl::Status SetTokens(const v1::Sample& sample, int64_t max_tokens, int64_t vocab,
                       TrainSample& out) {
  if (!sample.has_token_ids()) {
    return InvalidField("tokens", "token_ids, as the group has a prompt", "none");
  }
  const auto& ids = sample.token_ids().ids();
  RETURN_IF_ERROR(CheckRange("token_ids.size", ids.size(), 1, max_tokens));
  RETURN_IF_ERROR(CheckTokenIds("token_ids", absl::MakeConstSpan(ids.data(), ids.size()), vocab));
  RETURN_IF_ERROR(CheckLengths(sample, ids.size()));
  out.tokens.assign(ids.begin(), ids.end());
  return absl::OkStatus();
}

// Tokens from a rollout, which the engine looks up.
absl::Status SetRolloutSample(const v1::Sample& sample, std::vector<int32_t>& out) {
  if (!sample.has_rollout_sample()) {
    return InvalidField("tokens", "rollout_sample, as the group has a rollout_id", "none");
  }
  RETURN_IF_ERROR(CheckRange("rollout_sample", sample.rollout_sample(), 0, INT32_MAX));
  if (sample.old_logprobs_size() > 0 || sample.sampler_logprobs_size() > 0) {
    return InvalidField("old_logprobs and sampler_logprobs", "none: the rollout supplies them",
                        sample.old_logprobs_size() + sample.sampler_logprobs_size());
  }
  out.push_back(sample.rollout_sample());
  return absl::OkStatus();
}

absl::Status AddSample(const v1::Sample& sample, const LossConfig& loss,
                       const RequestLimits& limits, bool from_rollout, TrainGroup& group,
                       std::vector<int32_t>& rollout_samples) {
  RETURN_IF_ERROR(CheckNumbers(sample));
  RETURN_IF_ERROR(CheckCredit(sample, loss));
  RETURN_IF_ERROR(CheckReference(sample, loss));
  TrainSample& out = group.samples.emplace_back(Numbers(sample, loss));
  if (from_rollout) return SetRolloutSample(sample, rollout_samples);
  const int64_t room = limits.max_context - static_cast<int64_t>(group.prompt.size());
  return SetTokens(sample, room, limits.vocab, out);
}

absl::Status SetPrefix(const v1::Group& group, const RequestLimits& limits, TrainGroup& out) {
  if (group.has_rollout_id()) return CheckRolloutId(group.rollout_id());
  const auto& ids = group.prompt().ids();
  RETURN_IF_ERROR(CheckRange("prompt.size", ids.size(), 1, limits.max_context - 1));
  RETURN_IF_ERROR(
      CheckTokenIds("prompt", absl::MakeConstSpan(ids.data(), ids.size()), limits.vocab));
  out.prompt.assign(ids.begin(), ids.end());
  return absl::OkStatus();
}

absl::Status AddGroup(const v1::Group& group, const RequestLimits& limits, TrainStepRequest& out) {
  TrainGroup& native = out.batch.groups.emplace_back();
  out.rollout_ids.push_back(group.rollout_id());
  std::vector<int32_t>& rollout_samples = out.rollout_samples.emplace_back();
  RETURN_IF_ERROR(SetPrefix(group, limits, native));
  if (group.samples_size() == 0) return InvalidField("samples", "at least one", "none");
  for (int i = 0; i < group.samples_size(); ++i) {
    const absl::Status status = AddSample(group.samples(i), out.batch.loss, limits,
                                          group.has_rollout_id(), native, rollout_samples);
    if (!status.ok()) return At(absl::StrCat("samples[", i, "]."), status);
  }
  return absl::OkStatus();
}

template <typename Groups>
bool AnyReward(const Groups& groups) {
  for (const v1::Group& group : groups) {
    for (const v1::Sample& sample : group.samples()) {
      if (sample.has_reward()) return true;
    }
  }
  return false;
}

// What TrainStep and ForwardBackward have in common: groups, loss, version conditions.
template <typename Proto>
absl::Status SetBatch(const Proto& proto, const RequestLimits& limits, TrainStepRequest& out) {
  if (proto.groups_size() == 0) return InvalidField("groups", "at least one", "none");
  absl::StatusOr<LossConfig> loss = Loss(proto.loss(), AnyReward(proto.groups()));
  if (!loss.ok()) return At("loss.", loss.status());
  out.batch.loss = *loss;
  out.batch.return_logprobs = proto.return_logprobs();
  for (int g = 0; g < proto.groups_size(); ++g) {
    const absl::Status status = AddGroup(proto.groups(g), limits, out);
    if (!status.ok()) return At(absl::StrCat("groups[", g, "]."), status);
  }
  RETURN_IF_ERROR(CheckRange("max_policy_lag", proto.max_policy_lag(), 0, INT32_MAX));
  out.max_policy_lag = proto.max_policy_lag();
  return absl::OkStatus();
}

template <typename Proto>
absl::Status SetStep(const Proto& proto, const Tenant& tenant, TrainStepRequest& out) {
  if (proto.step_id().empty()) return InvalidField("step_id", "an id unique per step", "none");
  RETURN_IF_ERROR(CheckName("step_id", proto.step_id()));
  out.step_id = tenant.prefix + proto.step_id();
  out.tenant_salt = tenant.salt;
  ASSIGN_OR_RETURN(out.running, FromProto(proto.running(), RunningRequests::kDrain));
  if (proto.has_expected_policy_version()) {
    out.expected_policy_version = proto.expected_policy_version();
  }
  return absl::OkStatus();
}

absl::Status CheckBeta(absl::string_view field, float beta) {
  if (beta >= 0 && beta < 1) return absl::OkStatus();
  return InvalidField(field, "a number in [0, 1)", beta);
}

template <typename Proto>
absl::Status SetOptim(const Proto& proto, TrainStepRequest& out) {
  if (!proto.has_optim()) return InvalidField("optim", "AdamParams", "none");
  const v1::AdamParams& adam = proto.optim();
  AdamConfig& o = out.optim;
  o.learning_rate = adam.learning_rate();
  if (adam.has_beta1()) o.beta1 = adam.beta1();
  if (adam.has_beta2()) o.beta2 = adam.beta2();
  if (adam.has_eps()) o.eps = adam.eps();
  o.weight_decay = adam.weight_decay();
  if (adam.has_grad_clip_norm()) o.grad_clip_norm = adam.grad_clip_norm();
  RETURN_IF_ERROR(CheckNotNegative("optim.learning_rate", o.learning_rate));
  RETURN_IF_ERROR(CheckBeta("optim.beta1", o.beta1));
  RETURN_IF_ERROR(CheckBeta("optim.beta2", o.beta2));
  RETURN_IF_ERROR(CheckPositive("optim.eps", o.eps));
  RETURN_IF_ERROR(CheckNotNegative("optim.weight_decay", o.weight_decay));
  RETURN_IF_ERROR(CheckNotNegative("optim.grad_clip_norm", o.grad_clip_norm));
  out.durable = proto.durable();
  return absl::OkStatus();
}

template <typename Proto>
void SetOutcome(const TrainStepResult& result, Proto* proto) {
  proto->set_policy_version(Raw(result.policy_version));
  proto->set_repeated_step(result.repeated);
  for (const auto& [phase, seconds] : result.batch.phases) {
    v1::PhaseSeconds* out = proto->add_phases();
    out->set_phase(phase);
    out->set_seconds(seconds);
  }
}

template <typename Proto>
void SetBatchOutcome(const TrainStepResult& result, Proto* proto) {
  const ForwardBackwardResult& batch = result.batch;
  proto->set_loss(batch.loss);
  proto->mutable_metrics()->insert(batch.metrics.begin(), batch.metrics.end());
  v1::TokenStats* tokens = proto->mutable_tokens();
  tokens->set_flat(batch.tokens.flat);
  tokens->set_unique(batch.tokens.unique);
  tokens->set_prompt_forward_skipped(batch.tokens.prompt_forward_skipped);
  tokens->set_with_loss(batch.tokens.with_loss);
  for (const SampleResult& sample : batch.samples) {
    v1::SampleResult* out = proto->add_samples();
    out->mutable_logprobs()->Add(sample.logprobs.begin(), sample.logprobs.end());
    out->set_entropy(sample.entropy);
    out->set_kl(sample.kl);
  }
}

template <typename Proto>
void SetUpdateOutcome(const TrainStepResult& result, Proto* proto) {
  proto->set_skipped(result.skipped);
  proto->set_skip_reason(result.skip_reason);
  proto->set_grad_norm(result.grad_norm);
}

}  // namespace

absl::StatusOr<TrainStepRequest> FromProto(const v1::TrainStepRequest& proto, const Tenant& tenant,
                                           const RequestLimits& limits) {
  TrainStepRequest out;
  RETURN_IF_ERROR(SetStep(proto, tenant, out));
  RETURN_IF_ERROR(SetOptim(proto, out));
  RETURN_IF_ERROR(SetBatch(proto, limits, out));
  return out;
}

absl::StatusOr<TrainStepRequest> FromProto(const v1::ForwardBackwardRequest& proto,
                                           const Tenant& tenant, const RequestLimits& limits) {
  TrainStepRequest out;
  RETURN_IF_ERROR(SetStep(proto, tenant, out));
  RETURN_IF_ERROR(SetBatch(proto, limits, out));
  return out;
}

absl::StatusOr<TrainStepRequest> FromProto(const v1::OptimStepRequest& proto,
                                           const Tenant& tenant) {
  TrainStepRequest out;
  RETURN_IF_ERROR(SetStep(proto, tenant, out));
  RETURN_IF_ERROR(SetOptim(proto, out));
  return out;
}

void ToProto(const TrainStepResult& result, v1::TrainStepResponse* proto) {
  SetOutcome(result, proto);
  SetBatchOutcome(result, proto);
  SetUpdateOutcome(result, proto);
}

void ToProto(const TrainStepResult& result, v1::ForwardBackwardResponse* proto) {
  SetOutcome(result, proto);
  SetBatchOutcome(result, proto);
}

void ToProto(const TrainStepResult& result, v1::OptimStepResponse* proto) {
  SetOutcome(result, proto);
  SetUpdateOutcome(result, proto);
}

}  // namespace coppice
