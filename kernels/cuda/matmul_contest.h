// Which of several algorithms for the same product is the fastest, the library's own first choice
// standing unless another is clearly faster. The clock of a device at its power limit follows what
// has run before, so candidates run in turns: all of them in two rounds of short turns, then the
// first and the best two others in up to three rounds of turns long enough to set their own clock,
// which a candidate leaves once it is clearly slower.
#pragma once

#include <functional>
#include <vector>

#include "absl/status/statusor.h"

namespace coppice::cuda {

struct Contest {
  int winner = 0;
  double first_seconds = 0, winner_seconds = 0;  // of a run, medians of the rounds
};

// Runs a candidate once, and then again for about so long, at least once but for 0 seconds: the
// mean seconds of the later runs, or of the only one; infinity if it does not run.
using MeasureCandidate = std::function<absl::StatusOr<double>(int candidate, double seconds)>;

// REQUIRES: num_candidates >= 1. Errors: those of `measure`. Cost for 8 candidates: 0.3 to 0.6 s,
// or 1,800 runs if that is less.
absl::StatusOr<Contest> HoldContest(int num_candidates, const MeasureCandidate& measure);

}  // namespace coppice::cuda
