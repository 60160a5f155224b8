#include "trainer/validate.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

template <typename... Facts>
absl::Status Bad(const Facts&... facts) {
  return absl::InvalidArgumentError(absl::StrCat("train request refused: ", facts...));
}

// Names a sample in messages.
struct SamplePlace {
  size_t group;
  size_t sample;
  std::string Field(absl::string_view field) const {
    return absl::StrCat("group ", group, " sample ", sample, " ", field);
  }
};

absl::Status CheckTokens(const ModelConfig& config, const std::string& field,
                         const std::vector<int32_t>& tokens) {
  if (tokens.empty()) return Bad(field, " wants at least one token, got none; send the tokens");
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= config.vocab) {
      return Bad(field, " wants token ids in [0, ", config.vocab, "), got ", tokens[i], " at ", i,
                 "; use this model's tokenizer");
    }
  }
  return absl::OkStatus();
}

// Per-token values: absent or one for each response token, finite, at least `lowest`.
absl::Status CheckPerToken(const SamplePlace& place, absl::string_view field,
                           const std::vector<float>& values, size_t num_tokens,
                           float lowest = -INFINITY) {
  if (values.empty()) return absl::OkStatus();
  if (values.size() != num_tokens) {
    return Bad(place.Field(field), " wants ", num_tokens, " entries (one per response token), got ",
               values.size());
  }
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i]) || values[i] < lowest) {
      return Bad(place.Field(field), " wants finite values", lowest == 0 ? " >= 0" : "", ", got ",
                 values[i], " at ", i);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckAdvantage(const LossConfig& loss, const SamplePlace& place,
                            const TrainSample& sample) {
  const bool given = !sample.advantages.empty();
  if (given && sample.reward.has_value()) {
    return Bad(place.Field("advantages"), " and reward are both given; send one of them");
  }
  if (sample.reward.has_value() && !std::isfinite(*sample.reward)) {
    return Bad(place.Field("reward"), " wants a finite value, got ", *sample.reward);
  }
  if (loss.advantage != LossConfig::Advantage::kGiven) {
    if (sample.reward.has_value()) return absl::OkStatus();
    return Bad(place.Field("reward"), " is missing; advantages are to be computed from rewards");
  }
  if (sample.reward.has_value()) {
    return Bad(place.Field("reward"), " is given, but advantages are to be taken as given; ",
               "choose how to compute them");
  }
  if (!given && loss.kind != LossConfig::Kind::kCrossEntropy) {
    return Bad(place.Field("advantages"), " and reward are both missing; send one of them");
  }
  const size_t entries = sample.advantages.size() == 1 ? 1 : sample.tokens.size();
  return CheckPerToken(place, "advantages", sample.advantages, entries);
}

absl::Status CheckSample(const LossConfig& loss, const SamplePlace& place,
                         const TrainSample& sample) {
  const size_t n = sample.tokens.size();
  RETURN_IF_ERROR(CheckAdvantage(loss, place, sample));
  RETURN_IF_ERROR(CheckPerToken(place, "old_logprobs", sample.old_logprobs, n));
  RETURN_IF_ERROR(CheckPerToken(place, "sampler_logprobs", sample.sampler_logprobs, n));
  RETURN_IF_ERROR(CheckPerToken(place, "ref_logprobs", sample.ref_logprobs, n));
  RETURN_IF_ERROR(CheckPerToken(place, "loss_mask", sample.loss_mask, n, /*lowest=*/0));
  if (!std::isfinite(sample.weight) || sample.weight < 0) {
    return Bad(place.Field("weight"), " wants a finite value >= 0, got ", sample.weight);
  }
  if (loss.kl != LossConfig::KlEstimator::kNone && sample.ref_logprobs.empty()) {
    return Bad(place.Field("ref_logprobs"), " are missing; the kl term needs them");
  }
  if (loss.importance_cap.has_value() && sample.sampler_logprobs.empty()) {
    return Bad(place.Field("sampler_logprobs"), " are missing; importance_cap needs them");
  }
  return absl::OkStatus();
}

// `ok` is false for NaN as well.
absl::Status Want(bool ok, absl::string_view field, absl::string_view want, double got) {
  if (ok) return absl::OkStatus();
  return Bad(field, " wants ", want, ", got ", got);
}

absl::Status CheckLoss(const LossConfig& loss) {
  RETURN_IF_ERROR(ValidateTemperature(loss.temperature));
  RETURN_IF_ERROR(
      Want(loss.clip_low >= 0 && loss.clip_low <= 1, "clip low", "[0, 1]", loss.clip_low));
  RETURN_IF_ERROR(Want(loss.clip_high >= 0 && std::isfinite(loss.clip_high), "clip high",
                       "a finite value >= 0", loss.clip_high));
  const float dual = loss.clip_dual.value_or(2);
  RETURN_IF_ERROR(Want(dual > 1 && std::isfinite(dual), "clip dual", "a finite value > 1", dual));
  RETURN_IF_ERROR(Want(loss.kl_coef >= 0 && std::isfinite(loss.kl_coef), "kl coef",
                       "a finite value >= 0", loss.kl_coef));
  if (loss.kl == LossConfig::KlEstimator::kNone && loss.kl_coef != 0) {
    return Bad("kl coef ", loss.kl_coef, " is given without an estimator; choose k1, k2 or k3");
  }
  RETURN_IF_ERROR(
      Want(std::isfinite(loss.entropy_coef), "entropy_coef", "a finite value", loss.entropy_coef));
  const float cap = loss.importance_cap.value_or(1);
  RETURN_IF_ERROR(Want(cap > 0 && std::isfinite(cap), "importance_cap", "a finite value > 0", cap));
  const double denominator = loss.denominator.value_or(1);
  RETURN_IF_ERROR(Want(denominator > 0 && std::isfinite(denominator), "denominator",
                       "a finite value > 0", denominator));
  if (loss.aggregation == LossConfig::Aggregation::kConstant && !loss.denominator.has_value()) {
    return Bad("denominator is missing; the constant aggregation needs it");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateTemperature(float temperature) {
  return Want(temperature > 0 && std::isfinite(temperature), "temperature", "a finite value > 0",
              temperature);
}

absl::Status ValidateTokens(const ModelConfig& config, const std::vector<TrainGroup>& groups) {
  if (groups.empty()) return Bad("groups want at least one entry, got none");
  for (size_t g = 0; g < groups.size(); ++g) {
    RETURN_IF_ERROR(CheckTokens(config, absl::StrCat("group ", g, " prompt"), groups[g].prompt));
    if (groups[g].samples.empty()) {
      return Bad("group ", g, " samples want at least one entry, got none");
    }
    for (size_t s = 0; s < groups[g].samples.size(); ++s) {
      const SamplePlace place{g, s};
      const std::vector<int32_t>& response = groups[g].samples[s].tokens;
      RETURN_IF_ERROR(CheckTokens(config, place.Field("tokens"), response));
      const size_t length = groups[g].prompt.size() + response.size();
      if (length > static_cast<size_t>(config.max_positions)) {
        return Bad(place.Field("tokens"), " want prompt and response within the context of ",
                   config.max_positions, " tokens, got ", length, "; shorten them");
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateRequest(const ModelConfig& config, const ForwardBackwardRequest& request) {
  RETURN_IF_ERROR(CheckLoss(request.loss));
  RETURN_IF_ERROR(ValidateTokens(config, request.groups));
  for (size_t g = 0; g < request.groups.size(); ++g) {
    for (size_t s = 0; s < request.groups[g].samples.size(); ++s) {
      RETURN_IF_ERROR(CheckSample(request.loss, {g, s}, request.groups[g].samples[s]));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateAdam(const AdamConfig& config) {
  const auto check = [](float value, bool ok, absl::string_view field, absl::string_view want) {
    return Want(ok && std::isfinite(value), field, want, value);
  };
  RETURN_IF_ERROR(check(config.learning_rate, config.learning_rate >= 0, "learning_rate",
                        "a finite value >= 0"));
  RETURN_IF_ERROR(check(config.beta1, config.beta1 >= 0 && config.beta1 < 1, "beta1", "[0, 1)"));
  RETURN_IF_ERROR(check(config.beta2, config.beta2 >= 0 && config.beta2 < 1, "beta2", "[0, 1)"));
  RETURN_IF_ERROR(check(config.eps, config.eps > 0, "eps", "a finite value > 0"));
  RETURN_IF_ERROR(
      check(config.weight_decay, config.weight_decay >= 0, "weight_decay", "a finite value >= 0"));
  return check(config.grad_clip_norm, config.grad_clip_norm >= 0, "grad_clip_norm",
               "a finite value >= 0");
}

}  // namespace coppice
