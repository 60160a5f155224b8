// Loads for the placement simulation: requests with prompts as chains of block hashes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace coppice::bench {

// One Generate call. Its prompt is known by the chained hashes of its blocks of kSimBlockTokens.
struct SimRequest {
  double arrival_s = 0;          // of a turn after the first: think time after its `after` request
  int64_t after = -1;            // index of the request whose end this one waits for
  uint64_t prefix_hash = 0;      // home by hash
  uint64_t session = 0;          // 0 = none
  std::vector<uint64_t> blocks;  // whole blocks of the prompt
  std::vector<uint64_t> grown;   // blocks that the request leaves in the cache beyond `blocks`
  int64_t prompt_tokens = 0;
  int64_t n = 1;
  int64_t output_tokens = 0;  // of each sample
};

inline constexpr int64_t kSimBlockTokens = 256;

struct SimLoad {
  std::string name;
  int64_t max_tokens = 0;            // what the caller asks for, the same for all
  std::vector<SimRequest> requests;  // `after` points backwards
};

// A Mooncake trace: JSON lines with timestamp (ms), input_length, output_length and hash_ids of
// blocks of 512 tokens. NOT_FOUND, INVALID_ARGUMENT naming the line.
absl::StatusOr<SimLoad> ReadTrace(const std::string& path);

// Steps of reinforcement learning: all groups of a step arrive together as calls of n samples; then
// each sample goes on alone for the remaining turns, its tool's answer appended. The next step
// starts when the last sample of the one before has ended.
struct RlOptions {
  int64_t steps = 8;
  int64_t groups = 64;
  int64_t samples = 8;
  int64_t turns = 3;
  uint64_t seed = 1;
};
SimLoad MakeRlLoad(const RlOptions& options);

}  // namespace coppice::bench
