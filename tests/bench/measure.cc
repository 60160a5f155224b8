#include "tests/bench/measure.h"

#include <algorithm>
#include <iostream>
#include <vector>

#include "absl/strings/str_format.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/commit.h"

namespace coppice::bench {

absl::StatusOr<std::vector<double>> MedianSecondsOfStages(int64_t repeats,
                                                          const std::vector<Stage>& stages,
                                                          absl::Duration warm_up) {
  const SteadyClock clock;
  const absl::Duration start = clock.Now();
  do {
    for (const Stage& stage : stages) RETURN_IF_ERROR(stage());
  } while (clock.Now() - start < warm_up);
  std::vector<std::vector<double>> seconds(stages.size());
  for (int64_t i = 0; i < repeats; ++i) {
    for (size_t s = 0; s < stages.size(); ++s) {
      const absl::Duration begin = clock.Now();
      RETURN_IF_ERROR(stages[s]());
      seconds[s].push_back(absl::ToDoubleSeconds(clock.Now() - begin));
    }
  }
  std::vector<double> medians;
  for (std::vector<double>& stage : seconds) {
    std::nth_element(stage.begin(), stage.begin() + repeats / 2, stage.end());
    medians.push_back(stage[repeats / 2]);
  }
  return medians;
}

absl::StatusOr<double> MedianSeconds(int64_t repeats, const std::function<absl::Status()>& run,
                                     absl::Duration warm_up) {
  ASSIGN_OR_RETURN(const std::vector<double> seconds,
                   MedianSecondsOfStages(repeats, {run}, warm_up));
  return seconds[0];
}

void Print(const Options& options, const Result& result) {
  nlohmann::ordered_json shape = {
      {"geometry", options.geometry}, {"prompt", options.prompt},
      {"response", options.response}, {"group", options.group},
      {"mode", Name(options.mode)},   {"block_tokens", options.block_tokens},
      {"threads", options.threads},   {"repeats", options.repeats},
      {"seed", options.seed},
  };
  if (options.compute_dtype == DType::kF16) shape["compute_dtype"] = "f16";
  if (options.bf16_gradients) shape["gradients"] = "bf16";
  if (!options.matmul_cache.empty()) shape["matmul_cache"] = "file";
  if (options.cached > 0) shape["cached"] = options.cached;
  if (!result.pass.empty()) shape["pass"] = result.pass;
  nlohmann::ordered_json line = {
      {"bench", result.bench},     {"shape", shape},
      {"seconds", result.seconds}, {"bound_seconds", result.bound_seconds},
      {"bound", result.bound},     {"ratio", result.bound_seconds / result.seconds},
      {"peer", nullptr},           {"peer_seconds", nullptr},
      {"device", result.device},   {"commit", kCommit},
  };
  if (!result.peer.empty()) {
    line["peer"] = result.peer;
    line["peer_seconds"] = result.peer_seconds;
  }
  for (const auto& [name, count] : result.counts) line["counts"][name] = count;
  for (const auto& [phase, seconds] : result.phases) line["phases"][phase] = seconds;
  std::cout << line.dump() << std::endl;
}

absl::Status Verify(const std::string& what, double error, double tolerance) {
  if (error <= tolerance) return absl::OkStatus();  // false for NaN
  return absl::InternalError(
      absl::StrFormat("verify %s failed: want an error of at most %g, got %g; do not time a wrong "
                      "result",
                      what, tolerance, error));
}

}  // namespace coppice::bench
