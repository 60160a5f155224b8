// The subcommands. Each verifies on a small shape, times the asked one, and prints its lines.
// Errors: bad options (INVALID_ARGUMENT, NOT_FOUND), a wrong result (INTERNAL), too little memory
// (RESOURCE_EXHAUSTED).
#pragma once

#include "absl/status/status.h"
#include "tests/bench/options.h"

namespace coppice::bench {

absl::Status RunPrefill(const Options& options);
absl::Status RunDecode(const Options& options);
absl::Status RunTrainStep(const Options& options);
absl::Status RunAdamW(const Options& options);
absl::Status RunLogProbHead(const Options& options);
absl::Status RunRadix(const Options& options);
absl::Status RunPlacement(const Options& options);
absl::Status RunAttention(const Options& options);

}  // namespace coppice::bench
