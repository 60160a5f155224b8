// Which of several algorithms for the same product is the fastest, the library's own first choice
// standing unless another is clearly faster. The clock of a device at its power limit follows what
// has run before, so candidates run in turns: all of them in two rounds of short turns, then the
// first and the best two others in three rounds of turns long enough to set their own clock.
#pragma once

#include <functional>
#include <vector>

#include "absl/status/statusor.h"

namespace coppice::cuda {

struct Contest {
  int winner = 0;
  double first_seconds = 0, winner_seconds = 0;  // of a run, medians of the rounds
};

// Runs a candidate again and again for about so long: seconds of a run, infinity if it does not
// run.
using MeasureCandidate = std::function<absl::StatusOr<double>(int candidate, double seconds)>;

// REQUIRES: num_candidates >= 1. Errors: those of `measure`. Cost for 16 candidates: about 0.7 s,
// or 2,900 runs if that is less.
absl::StatusOr<Contest> HoldContest(int num_candidates, const MeasureCandidate& measure);

}  // namespace coppice::cuda
