// Checks of a GenerateRequest before it enters the queue. Pure; any thread.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "server/engine/request.h"

namespace coppice {

// What the model and the KV pool allow.
struct GenerateLimits {
  int64_t vocab = 0;
  int64_t max_context = 0;
  int64_t max_group_size = 0;
  int64_t num_blocks = 0;
  int64_t block_tokens = 0;
  bool has_tokenizer = false;  // text and stop strings need one
};

inline constexpr int32_t kMaxTopLogprobs = 20;
inline constexpr size_t kMaxStopStrings = 16;
inline constexpr size_t kMaxStopStringBytes = 256;
inline constexpr size_t kMaxStopTokens = 256;
inline constexpr size_t kMaxLogitBiases = 1024;

// INVALID_ARGUMENT naming the field with want and got.
absl::Status ValidateGenerate(const GenerateRequest& request, const GenerateLimits& limits);
// The part that Warm needs: prompt and cache fields.
absl::Status ValidatePrompt(const GenerateRequest& request, const GenerateLimits& limits);

}  // namespace coppice
