// Timing and reporting, the same for every benchmark: half a second of load first, then the median
// of the repeats; one JSON object a line on stdout.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "tests/bench/options.h"

namespace coppice::bench {

inline constexpr absl::Duration kWarmUp = absl::Milliseconds(500);
// Median seconds of `repeats` runs after at least one run and `warm_up` of load.
absl::StatusOr<double> MedianSeconds(int64_t repeats, const std::function<absl::Status()>& run,
                                     absl::Duration warm_up = kWarmUp);

// The same for runs that consist of stages, one after the other: a median for each stage.
using Stage = std::function<absl::Status()>;
absl::StatusOr<std::vector<double>> MedianSecondsOfStages(int64_t repeats,
                                                          const std::vector<Stage>& stages,
                                                          absl::Duration warm_up = kWarmUp);

struct Result {
  std::string bench;
  double seconds = 0;
  double bound_seconds = 0;
  std::string bound;  // what sets it and how it was measured
  std::string peer;   // empty = none
  double peer_seconds = 0;
  std::string device;
  std::string pass;  // which part of the work, e.g. forward or backward; empty = all of it
  // Seconds by phase, printed after everything else; empty = none.
  std::vector<std::pair<std::string, double>> phases;
  std::vector<std::pair<std::string, int64_t>> counts;  // tokens, bytes; empty = none
};
void Print(const Options& options, const Result& result);

// INTERNAL "verify <what> failed: want an error of at most .., got ..".
absl::Status Verify(const std::string& what, double error, double tolerance);

}  // namespace coppice::bench
