// Options of coppice_bench. One set for all subcommands; each uses what concerns it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/dtype.h"

namespace coppice::bench {

enum class Mode { kShared, kFlat, kKept, kUngrouped };

struct Options {
  std::string subcommand;
  std::string geometry = "smollm2-135m";
  std::string device = "cpu";
  Mode mode = Mode::kShared;
  int64_t prompt = 0;  // 0 = the subcommand's default
  int64_t cached = 0;  // of the prompt's tokens, before the timed pass
  int64_t response = 64;
  int64_t group = 8;
  int64_t block_tokens = 16;
  int64_t threads = 0;  // 0 = all cores
  int64_t repeats = 5;
  int64_t seed = 1;
  bool phases = false;
  bool bf16_gradients = false;
  DType compute_dtype = DType::kBF16;  // on cuda
  std::string matmul_cache;            // on cuda
};

inline const char* Name(Mode mode) {
  switch (mode) {
    case Mode::kShared:
      return "shared";
    case Mode::kFlat:
      return "flat";
    case Mode::kKept:
      return "kept";
    case Mode::kUngrouped:
      return "ungrouped";
  }
  return "";
}

// The text of --help.
std::string Usage();
// INVALID_ARGUMENT naming the argument. `help` is set if it was asked for.
absl::StatusOr<Options> ParseOptions(const std::vector<absl::string_view>& arguments, bool& help);

}  // namespace coppice::bench
