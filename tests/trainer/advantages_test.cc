#include "trainer/advantages.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/tolerances.h"

namespace coppice {
namespace {

using Kind = LossConfig::Advantage;

TEST(AdvantagesTest, NormalizesByTheUnbiasedStandardDeviation) {
  const std::vector<double> a = GroupAdvantages(Kind::kGroupNormalized, {1, 2, 3, 6});
  const double std_dev = std::sqrt((4 + 1 + 0 + 9) / 3.0) + 1e-6;
  const std::vector<double> want = {-2 / std_dev, -1 / std_dev, 0, 3 / std_dev};
  for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(a[i], want[i], tolerance::kDoubleSums);
}

TEST(AdvantagesTest, CentersWithoutDividing) {
  EXPECT_EQ(GroupAdvantages(Kind::kGroupCentered, {0, 1, 0, 1}),
            (std::vector<double>{-0.5, 0.5, -0.5, 0.5}));
}

TEST(AdvantagesTest, LeavesOneOut) {
  const std::vector<double> a = GroupAdvantages(Kind::kLeaveOneOut, {1, 2, 6});
  const std::vector<double> want = {1 - 4.0, 2 - 3.5, 6 - 1.5};
  for (size_t i = 0; i < want.size(); ++i) EXPECT_NEAR(a[i], want[i], tolerance::kDoubleSums);
}

TEST(AdvantagesTest, AreZeroInAGroupOfOneAndForEqualRewards) {
  for (const Kind kind : {Kind::kGroupNormalized, Kind::kGroupCentered, Kind::kLeaveOneOut}) {
    EXPECT_EQ(GroupAdvantages(kind, {5}), std::vector<double>{0});
    for (const double a : GroupAdvantages(kind, {0.25, 0.25, 0.25})) EXPECT_EQ(a, 0);
  }
}

TEST(AdvantagesTest, TakesGivenOnesAndDefaultsToOne) {
  LossConfig config;
  const TrainGroup group{
      .prompt = {1}, .samples = {{.tokens = {2, 3}, .advantages = {0.5f, -1}}, {.tokens = {4}}}};
  EXPECT_EQ(SampleAdvantages(config, group), (std::vector<std::vector<double>>{{0.5, -1}, {1}}));
}

TEST(AdvantagesTest, ComputesFromRewardsOfTheGroup) {
  LossConfig config{.advantage = Kind::kGroupCentered};
  const TrainGroup group{.prompt = {1},
                         .samples = {{.tokens = {2}, .reward = 1}, {.tokens = {3}, .reward = 3}}};
  EXPECT_EQ(SampleAdvantages(config, group), (std::vector<std::vector<double>>{{-1}, {1}}));
}

}  // namespace
}  // namespace coppice
