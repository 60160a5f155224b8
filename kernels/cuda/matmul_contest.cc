#include "kernels/cuda/matmul_contest.h"

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "kernels/base/status_macros.h"

namespace coppice::cuda {
namespace {

constexpr double kTurnSeconds = 0.05;  // the power limit answers within a few hundredths
constexpr int kTurnRuns = 200;         // enough of short products
constexpr int kRounds = 3;
constexpr double kShortTurn = 1.0 / 6;
constexpr int kShortRounds = 2;
constexpr size_t kFinalists = 3;
// Slower by more, in all short turns or in one long turn, a candidate is out.
constexpr double kInReach = 1.03;
// By less a candidate may win by chance.
constexpr double kClearlyFaster = 0.99;

// The first, then the fastest of the others that may still win.
absl::StatusOr<std::vector<int>> Finalists(int num_candidates, double turn_seconds,
                                           const MeasureCandidate& measure) {
  std::vector<double> sums(num_candidates, 0.0);
  for (int round = 0; round < kShortRounds; ++round) {
    for (int i = 0; i < num_candidates; ++i) {
      ASSIGN_OR_RETURN(const double run, measure(i, turn_seconds));
      sums[i] += run;
    }
  }
  std::vector<int> others(num_candidates - 1);
  std::iota(others.begin(), others.end(), 1);
  std::stable_sort(others.begin(), others.end(), [&](int a, int b) { return sums[a] < sums[b]; });
  std::vector<int> finalists = {0};
  for (const int i : others) {
    if (finalists.size() < kFinalists && sums[i] < kInReach * sums[0]) finalists.push_back(i);
  }
  return finalists;
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size()) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Of `left`, which has one or more, those in reach of the fastest in their last turn.
std::vector<int> StillInReach(const std::vector<int>& left,
                              const std::vector<std::vector<double>>& seconds) {
  double best = seconds[left[0]].back();
  for (const int i : left) best = std::min(best, seconds[i].back());
  std::vector<int> rest;
  for (const int i : left) {
    if (seconds[i].back() <= kInReach * best) rest.push_back(i);
  }
  return rest;
}

}  // namespace

absl::StatusOr<Contest> HoldContest(int num_candidates, const MeasureCandidate& measure) {
  for (int i = 0; i < num_candidates; ++i) RETURN_IF_ERROR(measure(i, 0).status());
  ASSIGN_OR_RETURN(const double one_run, measure(0, 0));
  const double turn_seconds = std::min(kTurnSeconds, kTurnRuns * one_run);
  RETURN_IF_ERROR(measure(0, turn_seconds).status());  // so that all meet a device under load
  ASSIGN_OR_RETURN(std::vector<int> left,
                   Finalists(num_candidates, kShortTurn * turn_seconds, measure));
  std::vector<std::vector<double>> seconds(num_candidates);  // of long turns
  for (int round = 0; round < kRounds && (round == 0 || left.size() > 1); ++round) {
    for (const int i : left) {
      ASSIGN_OR_RETURN(const double run, measure(i, turn_seconds));
      seconds[i].push_back(run);
    }
    left = StillInReach(left, seconds);
  }
  const int best = *std::min_element(left.begin(), left.end(), [&](int a, int b) {
    return Median(seconds[a]) < Median(seconds[b]);
  });
  const double first_seconds = Median(seconds[0]), best_seconds = Median(seconds[best]);
  const bool first_is_left = left[0] == 0;
  if (first_is_left && best_seconds >= kClearlyFaster * first_seconds) {
    return Contest{.first_seconds = first_seconds, .winner_seconds = first_seconds};
  }
  return Contest{best, first_seconds, best_seconds};
}

}  // namespace coppice::cuda
