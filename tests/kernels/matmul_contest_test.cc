#include "kernels/cuda/matmul_contest.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

namespace coppice::cuda {
namespace {

// Runs of fixed length; counts the time that each candidate got.
class Candidates {
 public:
  explicit Candidates(std::vector<double> seconds)
      : seconds_(std::move(seconds)), spent_(seconds_.size()) {}

  Contest Hold() {
    const auto contest = HoldContest(static_cast<int>(seconds_.size()),
                                     [this](int i, double seconds) -> absl::StatusOr<double> {
                                       spent_[i] += seconds;
                                       return seconds_[i];
                                     });
    EXPECT_TRUE(contest.ok()) << contest.status();
    return contest.ok() ? *contest : Contest{.winner = -1};
  }
  double spent(int i) const { return spent_[i]; }

 private:
  std::vector<double> seconds_, spent_;
};

TEST(MatMulContestTest, TheFastestWins) {
  const Contest contest = Candidates({1e-3, 1.2e-3, 0.95e-3, 0.9e-3, 0.93e-3}).Hold();
  EXPECT_EQ(contest.winner, 3);
  EXPECT_EQ(contest.first_seconds, 1e-3);
  EXPECT_EQ(contest.winner_seconds, 0.9e-3);
}

TEST(MatMulContestTest, TheFirstStandsUnlessAnotherIsClearlyFaster) {
  EXPECT_EQ(Candidates({1e-3, 0.995e-3}).Hold().winner, 0);
  EXPECT_EQ(Candidates({1e-3, 0.985e-3}).Hold().winner, 1);
  EXPECT_EQ(Candidates({1e-3, 1e-3, 1e-3}).Hold().winner, 0);
}

TEST(MatMulContestTest, OneCandidateOrOneThatDoesNotRunIsNoRival) {
  EXPECT_EQ(Candidates({1e-3}).Hold().winner, 0);
  const Contest contest =
      Candidates({1e-3, std::numeric_limits<double>::infinity(), 0.9e-3}).Hold();
  EXPECT_EQ(contest.winner, 2);
}

TEST(MatMulContestTest, OnlyCandidatesInReachRunForLong) {
  Candidates candidates({1e-3, 1.5e-3, 0.99e-3, 1.01e-3, 1.02e-3});
  candidates.Hold();
  EXPECT_GT(candidates.spent(0), 0.15);
  EXPECT_GT(candidates.spent(2), 0.15);
  EXPECT_GT(candidates.spent(3), 0.15);
  EXPECT_LT(candidates.spent(1), 0.03);
  EXPECT_LT(candidates.spent(4), 0.03);
}

TEST(MatMulContestTest, AFirstThatIsFarBehindOrAheadIsSoonDecided) {
  Candidates behind({1e-3, 0.9e-3}), ahead({1e-3, 1.1e-3}), close({1e-3, 0.98e-3});
  EXPECT_EQ(behind.Hold().winner, 1);
  EXPECT_EQ(ahead.Hold().winner, 0);
  EXPECT_EQ(close.Hold().winner, 1);
  EXPECT_LT(behind.spent(1), 0.5 * close.spent(1));
  EXPECT_LT(ahead.spent(0), 0.7 * close.spent(0));
}

TEST(MatMulContestTest, ShortProductsTakeShortTurns) {
  Candidates candidates({1e-5, 0.9e-5});
  EXPECT_EQ(candidates.Hold().winner, 1);
  EXPECT_LT(candidates.spent(0) + candidates.spent(1), 0.02);
}

// The clock of the device falls from run to run: turns keep the comparison fair.
TEST(MatMulContestTest, ADriftingClockMakesNoWinner) {
  double slower = 1;
  const auto contest = HoldContest(
      3, [&](int, double) -> absl::StatusOr<double> { return 1e-3 * (slower *= 0.9985); });
  ASSERT_TRUE(contest.ok());
  EXPECT_EQ(contest->winner, 0);
}

TEST(MatMulContestTest, AnErrorOfTheDeviceEndsIt) {
  const auto contest = HoldContest(
      2, [](int, double) -> absl::StatusOr<double> { return absl::InternalError("lost"); });
  EXPECT_EQ(contest.status().message(), "lost");
}

}  // namespace
}  // namespace coppice::cuda
