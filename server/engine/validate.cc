#include "server/engine/validate.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

template <typename Want, typename Got>
absl::Status Bad(absl::string_view field, const Want& want, const Got& got,
                 absl::string_view advice = "") {
  return absl::InvalidArgumentError(absl::StrCat("generate: ", field, ": want ", want, ", got ",
                                                 got, advice.empty() ? "" : "; ", advice));
}

std::string TokenRange(int64_t vocab) { return absl::StrCat("token ids in [0, ", vocab, ")"); }

absl::Status CheckFilters(const SamplingOptions& s, const GenerateLimits& limits) {
  if (!std::isfinite(s.temperature) || s.temperature < 0) {
    return Bad("temperature", "a finite number >= 0", s.temperature, "0 is greedy");
  }
  if (s.top_k < 0 || s.top_k > limits.vocab) {
    return Bad("top_k", absl::StrCat("0 (off) to ", limits.vocab), s.top_k);
  }
  if (!(s.top_p > 0 && s.top_p <= 1)) return Bad("top_p", "a number in (0, 1]", s.top_p);
  if (!(s.min_p >= 0 && s.min_p < 1)) return Bad("min_p", "a number in [0, 1)", s.min_p);
  if (s.logit_bias.size() > kMaxLogitBiases) {
    return Bad("logit_bias", absl::StrCat("at most ", kMaxLogitBiases), s.logit_bias.size());
  }
  for (const auto& [id, bias] : s.logit_bias) {
    if (id < 0 || id >= limits.vocab) return Bad("logit_bias", TokenRange(limits.vocab), id);
    if (!std::isfinite(bias)) return Bad("logit_bias", "finite values", bias);
  }
  return absl::OkStatus();
}

absl::Status CheckStops(const SamplingOptions& s, const GenerateLimits& limits) {
  if (s.stop_token_ids.size() > kMaxStopTokens) {
    return Bad("stop_token_ids", absl::StrCat("at most ", kMaxStopTokens), s.stop_token_ids.size());
  }
  for (int32_t id : s.stop_token_ids) {
    if (id < 0 || id >= limits.vocab) return Bad("stop_token_ids", TokenRange(limits.vocab), id);
  }
  if (s.stop_strings.size() > kMaxStopStrings) {
    return Bad("stop_strings", absl::StrCat("at most ", kMaxStopStrings), s.stop_strings.size());
  }
  for (const std::string& stop : s.stop_strings) {
    if (stop.empty() || stop.size() > kMaxStopStringBytes) {
      return Bad("stop_strings", absl::StrCat("1 to ", kMaxStopStringBytes, " bytes"), stop.size());
    }
  }
  if (!s.stop_strings.empty() && !limits.has_tokenizer) {
    return Bad("stop_strings", "none", s.stop_strings.size(),
               "the model has no tokenizer, use stop_token_ids");
  }
  return absl::OkStatus();
}

absl::Status CheckFits(const GenerateRequest& request, const GenerateLimits& limits) {
  const int64_t prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t tokens =
      std::min<int64_t>(prompt + request.sampling.max_tokens, limits.max_context);
  const int64_t blocks = (tokens + limits.block_tokens - 1) / limits.block_tokens;
  if (blocks <= limits.num_blocks) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("generate: kv pool too small: need ", blocks, " blocks of ", limits.block_tokens,
                   " tokens for prompt + max_tokens = ", tokens, ", have ", limits.num_blocks,
                   "; lower max_tokens or start the daemon with a larger kv pool"));
}

}  // namespace

absl::Status ValidatePrompt(const GenerateRequest& request, const GenerateLimits& limits) {
  if (request.prompt.empty()) return Bad("prompt", "at least 1 token", 0);
  if (static_cast<int64_t>(request.prompt.size()) >= limits.max_context) {
    return Bad("prompt", absl::StrCat("fewer tokens than the context of ", limits.max_context),
               request.prompt.size(), "shorten the prompt");
  }
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    const int32_t id = request.prompt[i];
    if (id >= 0 && id < limits.vocab) continue;
    return Bad(absl::StrCat("prompt[", i, "]"), TokenRange(limits.vocab), id);
  }
  if (request.cache_priority < 0 || request.cache_priority > 100) {
    return Bad("cache priority", "0 to 100", request.cache_priority);
  }
  if (request.cache_ttl.has_value() && *request.cache_ttl <= absl::ZeroDuration()) {
    return Bad("cache ttl", "a positive duration", absl::FormatDuration(*request.cache_ttl));
  }
  return CheckFits(request, limits);
}

absl::Status ValidateGenerate(const GenerateRequest& request, const GenerateLimits& limits) {
  const SamplingOptions& s = request.sampling;
  if (request.n < 1 || request.n > limits.max_group_size) {
    return Bad("n", absl::StrCat("1 to ", limits.max_group_size, " samples"), request.n);
  }
  if (s.max_tokens < 1) return Bad("max_tokens", "at least 1", s.max_tokens);
  RETURN_IF_ERROR(CheckFilters(s, limits));
  RETURN_IF_ERROR(CheckStops(s, limits));
  if (request.top_logprobs < 0 || request.top_logprobs > kMaxTopLogprobs ||
      request.top_logprobs > limits.vocab) {
    return Bad("top_logprobs",
               absl::StrCat("0 to ", std::min<int64_t>(kMaxTopLogprobs, limits.vocab)),
               request.top_logprobs);
  }
  if (request.return_text && !limits.has_tokenizer) {
    return Bad("return_text", "false", "true", "the model has no tokenizer, read token ids");
  }
  return ValidatePrompt(request, limits);
}

}  // namespace coppice
