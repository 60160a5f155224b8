#include <cmath>
#include <utility>

#include "kernels/base/status_macros.h"
#include "server/rpc/convert.h"
#include "server/rpc/field_check.h"

namespace coppice {
namespace {

constexpr int64_t kMaxPriority = 1000;
constexpr int64_t kMaxTtlSeconds = int64_t{10} * 365 * 24 * 3600;
// No tokenizer's average token is longer: more text cannot fit the context and is refused before it
// is tokenized.
constexpr int64_t kMaxTextBytesPerToken = 64;

absl::Span<const int32_t> Ids(const v1::TokenIds& tokens) {
  return absl::MakeConstSpan(tokens.ids().data(), tokens.ids_size());
}

void Append(absl::Span<const int32_t> ids, std::vector<int32_t>& out) {
  out.insert(out.end(), ids.begin(), ids.end());
}

absl::Status AppendText(const std::string& text, const RequestLimits& limits,
                        std::vector<int32_t>& out) {
  if (limits.tokenizer == nullptr) return NoTokenizer("prompt.text");
  const int64_t max_bytes = limits.max_context * kMaxTextBytesPerToken;
  if (static_cast<int64_t>(text.size()) > max_bytes) {
    return InvalidField("prompt.text", absl::StrCat("at most ", max_bytes, " bytes"), text.size());
  }
  if (!text.empty()) Append(limits.tokenizer->Encode(text, /*add_special=*/true), out);
  return absl::OkStatus();
}

// The prompt's token ids; whether they fit vocabulary and context is the engine's question.
absl::StatusOr<std::vector<int32_t>> PromptTokens(const v1::Prompt& prompt,
                                                  const RequestLimits& limits) {
  std::vector<int32_t> tokens;
  if (prompt.has_tokens()) Append(Ids(prompt.tokens()), tokens);
  if (prompt.has_text()) RETURN_IF_ERROR(AppendText(prompt.text(), limits, tokens));
  Append(Ids(prompt.suffix()), tokens);
  return tokens;
}

SamplingOptions Sampling(const v1::SamplingParams& proto) {
  SamplingOptions o;
  if (proto.has_temperature()) o.temperature = proto.temperature();
  if (proto.has_top_p()) o.top_p = proto.top_p();
  o.top_k = proto.top_k();
  o.min_p = proto.min_p();
  if (proto.has_seed()) o.seed = proto.seed();
  o.max_tokens = proto.max_tokens();
  o.ignore_eos = proto.ignore_eos();
  o.stop_token_ids.assign(proto.stop_token_ids().begin(), proto.stop_token_ids().end());
  o.stop_strings.assign(proto.stop_strings().begin(), proto.stop_strings().end());
  o.logit_bias.insert(proto.logit_bias().begin(), proto.logit_bias().end());
  return o;
}

absl::StatusOr<LogprobMode> Logprobs(v1::LogprobMode mode) {
  switch (mode) {
    case v1::LOGPROB_MODE_UNSPECIFIED:
    case v1::LOGPROB_MODE_NONE:
      return LogprobMode::kNone;
    case v1::LOGPROB_MODE_RAW:
      return LogprobMode::kRaw;
    case v1::LOGPROB_MODE_AS_SAMPLED:
      return LogprobMode::kAsSampled;
    default:
      return InvalidField("logprobs", "a LogprobMode", static_cast<int>(mode));
  }
}

absl::Status SetCacheControl(const v1::CacheControl& proto, GenerateRequest& out) {
  RETURN_IF_ERROR(CheckName("cache.key", proto.key()));
  out.cache_skip_read = proto.skip_read();
  out.cache_skip_write = proto.skip_write();
  if (proto.has_priority()) out.cache_priority = proto.priority();
  if (proto.has_ttl()) {
    const int64_t seconds = proto.ttl().seconds(), nanos = proto.ttl().nanos();
    RETURN_IF_ERROR(CheckRange("cache.ttl.seconds", seconds, 0, kMaxTtlSeconds));
    RETURN_IF_ERROR(CheckRange("cache.ttl.nanos", nanos, seconds == 0 ? 1 : 0, 999'999'999));
    out.cache_ttl = absl::Seconds(seconds) + absl::Nanoseconds(nanos);
  }
  return absl::OkStatus();
}

absl::Status SetNames(const std::string& request_id, const std::string& session_id,
                      const Tenant& tenant, GenerateRequest& out) {
  RETURN_IF_ERROR(CheckName("request_id", request_id));
  RETURN_IF_ERROR(CheckName("session_id", session_id));
  if (!request_id.empty()) out.request_id = tenant.prefix + request_id;
  if (!session_id.empty()) out.session_id = tenant.prefix + session_id;
  out.tenant_salt = tenant.salt;
  return absl::OkStatus();
}

absl::Status SetScoreGroup(const v1::ScoreGroup& group, const RequestLimits& limits,
                           TrainGroup& out) {
  Append(Ids(group.prompt()), out.prompt);
  if (out.prompt.empty()) return InvalidField("prompt", "at least one token", "none");
  RETURN_IF_ERROR(CheckTokenIds("prompt", out.prompt, limits.vocab));
  if (group.responses_size() == 0) return InvalidField("responses", "at least one", "none");
  const int64_t room = limits.max_context - static_cast<int64_t>(out.prompt.size());
  for (int r = 0; r < group.responses_size(); ++r) {
    const std::string field = absl::StrCat("responses[", r, "]");
    const absl::Span<const int32_t> ids = Ids(group.responses(r));
    RETURN_IF_ERROR(CheckRange(field + ".size", ids.size(), 1, room));
    RETURN_IF_ERROR(CheckTokenIds(field, ids, limits.vocab));
    Append(ids, out.samples.emplace_back().tokens);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GenerateRequest> FromProto(const v1::GenerateRequest& proto, const Tenant& tenant,
                                          const RequestLimits& limits) {
  GenerateRequest out;
  RETURN_IF_ERROR(SetNames(proto.request_id(), proto.session_id(), tenant, out));
  if (proto.has_n()) out.n = proto.n();
  out.sampling = Sampling(proto.sampling());
  ASSIGN_OR_RETURN(out.logprobs, Logprobs(proto.logprobs()));
  if (proto.top_logprobs() > 0 && out.logprobs == LogprobMode::kNone) {
    return InvalidField("logprobs", "RAW or AS_SAMPLED with top_logprobs", "NONE");
  }
  out.top_logprobs = proto.top_logprobs();
  RETURN_IF_ERROR(SetCacheControl(proto.cache(), out));
  RETURN_IF_ERROR(CheckRange("priority", proto.priority(), -kMaxPriority, kMaxPriority));
  out.priority = proto.priority();
  out.retain = proto.retain();
  out.return_text = proto.return_text();
  ASSIGN_OR_RETURN(out.prompt, PromptTokens(proto.prompt(), limits));
  return out;
}

absl::StatusOr<GenerateRequest> FromProto(const v1::WarmRequest& proto, const Tenant& tenant,
                                          const RequestLimits& limits) {
  GenerateRequest out;
  RETURN_IF_ERROR(SetNames(proto.request_id(), proto.session_id(), tenant, out));
  RETURN_IF_ERROR(SetCacheControl(proto.cache(), out));
  if (proto.cache().skip_write()) return InvalidField("cache.skip_write", "false", "true");
  ASSIGN_OR_RETURN(out.prompt, PromptTokens(proto.prompt(), limits));
  out.sampling.max_tokens = 1;  // never drawn: warming ends with the prompt
  return out;
}

absl::StatusOr<ScoreRequest> FromProto(const v1::ScoreRequest& proto, const Tenant& tenant,
                                       const RequestLimits& limits) {
  ScoreRequest out;
  out.tenant_salt = tenant.salt;
  if (proto.has_temperature()) out.temperature = proto.temperature();
  if (!std::isfinite(out.temperature) || out.temperature <= 0) {
    return InvalidField("temperature", "a finite number > 0", out.temperature);
  }
  if (proto.groups_size() == 0) return InvalidField("groups", "at least one", "none");
  for (int g = 0; g < proto.groups_size(); ++g) {
    const absl::Status status = SetScoreGroup(proto.groups(g), limits, out.groups.emplace_back());
    if (!status.ok()) return At(absl::StrCat("groups[", g, "]."), status);
  }
  return out;
}

absl::StatusOr<AbortCall> FromProto(const v1::AbortRequest& proto, const Tenant& tenant) {
  const bool by_request = proto.has_request_id();
  const std::string& name = by_request ? proto.request_id() : proto.session_id();
  if (name.empty()) return InvalidField("target", "a request_id or session_id", "none");
  RETURN_IF_ERROR(CheckName(by_request ? "request_id" : "session_id", name));
  AbortCall out;
  (by_request ? out.request_id : out.session_id) = tenant.prefix + name;
  return out;
}

v1::Usage ToProto(const Usage& usage) {
  v1::Usage proto;
  proto.set_prompt_tokens(usage.prompt_tokens);
  proto.set_cached_device_tokens(usage.cached_device_tokens);
  proto.set_joined_tokens(usage.joined_tokens);
  proto.set_computed_tokens(usage.computed_tokens);
  proto.set_written_tokens(usage.written_tokens);
  proto.set_miss_reason(static_cast<v1::MissReason>(usage.miss_reason));  // same values
  proto.set_completion_tokens(usage.completion_tokens);
  return proto;
}

v1::TokenChunk ToProto(const TokenChunk& chunk) {
  v1::TokenChunk proto;
  proto.set_sample(chunk.sample);
  proto.mutable_token_ids()->Add(chunk.token_ids.begin(), chunk.token_ids.end());
  proto.mutable_logprobs()->Add(chunk.logprobs.begin(), chunk.logprobs.end());
  for (const TopLogprobs& top : chunk.top_logprobs) {
    v1::TopLogprobs* out = proto.add_top_logprobs();
    out->mutable_token_ids()->Add(top.token_ids.begin(), top.token_ids.end());
    out->mutable_logprobs()->Add(top.logprobs.begin(), top.logprobs.end());
  }
  proto.set_text(chunk.text);
  proto.set_policy_version(Raw(chunk.policy_version));
  return proto;
}

v1::Finished ToProto(const SampleFinished& finished) {
  v1::Finished proto;
  proto.set_sample(finished.sample);
  proto.set_reason(static_cast<v1::FinishReason>(static_cast<int>(finished.reason) + 1));
  proto.set_num_tokens(finished.num_tokens);
  return proto;
}

}  // namespace coppice
