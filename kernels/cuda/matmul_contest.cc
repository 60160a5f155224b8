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
// Slower by more in short turns, a candidate is out.
constexpr double kStillInReach = 1.03;
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
    if (finalists.size() < kFinalists && sums[i] < kStillInReach * sums[0]) finalists.push_back(i);
  }
  return finalists;
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size()) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

absl::StatusOr<Contest> HoldContest(int num_candidates, const MeasureCandidate& measure) {
  ASSIGN_OR_RETURN(const double one_run, measure(0, 0));
  const double turn_seconds = std::min(kTurnSeconds, kTurnRuns * one_run);
  RETURN_IF_ERROR(measure(0, turn_seconds).status());  // so that all meet a device under load
  ASSIGN_OR_RETURN(const std::vector<int> finalists,
                   Finalists(num_candidates, kShortTurn * turn_seconds, measure));
  std::vector<std::vector<double>> seconds(finalists.size());
  const int rounds = finalists.size() > 1 ? kRounds : 1;
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < finalists.size(); ++i) {
      ASSIGN_OR_RETURN(const double run, measure(finalists[i], turn_seconds));
      seconds[i].push_back(run);
    }
  }
  Contest contest;
  contest.first_seconds = contest.winner_seconds = Median(seconds[0]);
  for (size_t i = 1; i < finalists.size(); ++i) {
    const double median = Median(seconds[i]);
    if (median < kClearlyFaster * contest.first_seconds && median < contest.winner_seconds) {
      contest.winner = finalists[i];
      contest.winner_seconds = median;
    }
  }
  return contest;
}

}  // namespace coppice::cuda
