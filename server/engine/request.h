// Native form of the Generation service's messages: what the engine is asked and what it answers.
// proto <-> native translation lives in server/rpc/convert.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "cache/radix_cache.h"
#include "kernels/base/ids.h"

namespace coppice {

struct SamplingOptions {
  float temperature = 1;  // 0 = greedy
  int32_t top_k = 0;      // 0 = off
  float top_p = 1;
  float min_p = 0;
  std::optional<uint64_t> seed;         // drawn and returned if absent
  int32_t max_tokens = 0;               // > 0
  std::vector<int32_t> stop_token_ids;  // besides the model's own end tokens
  std::vector<std::string> stop_strings;
  bool ignore_eos = false;
  std::map<int32_t, float> logit_bias;
};

enum class LogprobMode { kNone, kRaw, kAsSampled };

struct GenerateRequest {
  std::string request_id;       // caller's name, may be empty
  std::string tenant_salt;      // from the authenticated identity
  std::vector<int32_t> prompt;  // token ids
  int32_t n = 1;
  SamplingOptions sampling;
  LogprobMode logprobs = LogprobMode::kNone;
  int32_t top_logprobs = 0;
  bool cache_skip_read = false;
  bool cache_skip_write = false;
  int32_t cache_priority = 35;
  std::optional<absl::Duration> cache_ttl;
  std::string session_id;
  int32_t priority = 0;  // higher first
  bool retain = false;   // keep the group as a rollout
  bool return_text = false;
  std::optional<absl::Duration> deadline;  // on the engine's Clock
};

enum class FinishReason { kStopToken, kStopString, kLength, kAborted, kContextFull, kPaused };

// prompt_tokens == cached_device_tokens + joined_tokens + computed_tokens, always. For a group the
// prompt counts once.
struct Usage {
  int32_t prompt_tokens = 0;
  int32_t cached_device_tokens = 0;
  int32_t joined_tokens = 0;  // computed by another request in flight
  int32_t computed_tokens = 0;
  int32_t written_tokens = 0;  // newly published to the cache
  MissReason miss_reason = MissReason::kNone;
  int32_t completion_tokens = 0;
};

struct TopLogprobs {
  std::vector<int32_t> token_ids;
  std::vector<float> logprobs;
};

struct TokenChunk {
  int32_t sample = 0;
  std::vector<int32_t> token_ids;
  std::vector<float> logprobs;            // by LogprobMode; empty if kNone
  std::vector<TopLogprobs> top_logprobs;  // per token, if asked
  std::string text;                       // if return_text
  PolicyVersion policy_version{0};        // of every token in this chunk
};

struct SampleFinished {
  int32_t sample = 0;
  FinishReason reason = FinishReason::kLength;
  int32_t num_tokens = 0;
};

// Where a request's events go. Implemented by the RPC layer; every On* method is called by the
// engine thread and must not block. Order: OnStarted, then chunks and OnSampleFinished of all
// samples, then exactly one OnDone, after which the engine has dropped its reference. A cancelled
// or failed request gets OnDone with the status at any time.
class GenerateSink {
 public:
  virtual ~GenerateSink() = default;
  // False while the reader is behind: the engine pauses the request's decoding (its blocks stay
  // leased) and asks again.
  virtual bool HasRoom() const = 0;
  // True once the caller is gone: the engine aborts the request and frees its blocks in the same
  // step.
  virtual bool Cancelled() const = 0;
  virtual void OnStarted(uint64_t seed, const Usage& prompt_usage, PolicyVersion version) = 0;
  virtual void OnChunk(TokenChunk chunk) = 0;
  virtual void OnSampleFinished(const SampleFinished& finished) = 0;
  // OK: the group finished; `usage` is final and `rollout_id` is set if retained.
  virtual void OnDone(const absl::Status& status, const Usage& usage, const std::string& rollout_id,
                      PolicyVersion version) = 0;
};

}  // namespace coppice
