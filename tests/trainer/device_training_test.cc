// Training on every device: it learns, no update is lost to overflow, and one that overflows is
// skipped and answered with a lower scale.
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "tests/trainer/device_policy.h"

namespace coppice {
namespace {

class DeviceTrainingTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    SetMinLogSeverity(LogSeverity::kError);
    const absl::Status device = CreateTestOps(GetParam(), 1).status();
    if (SkipsDevice(GetParam(), device)) GTEST_SKIP() << device;
    ASSERT_TRUE(device.ok()) << device;
  }
  static bool f16() { return ComputeDType(GetParam()) == DType::kF16; }

  static std::vector<int32_t> Tokens(std::mt19937_64& random, int n) {
    std::vector<int32_t> tokens(n);
    for (int32_t& t : tokens) t = static_cast<int32_t>(random() % DevicePolicy::kVocab);
    return tokens;
  }
  // To be learnt by heart: four prompts with three responses each, `advantage` for all.
  static ForwardBackwardRequest Request(float advantage) {
    std::mt19937_64 random(4);
    ForwardBackwardRequest request;
    request.loss.kind = LossConfig::Kind::kCrossEntropy;
    for (int g = 0; g < 4; ++g) {
      TrainGroup group{.prompt = Tokens(random, 20)};
      for (int s = 0; s < 3; ++s) {
        group.samples.push_back({.tokens = Tokens(random, 9), .advantages = {advantage}});
      }
      request.groups.push_back(std::move(group));
    }
    return request;
  }
};

TEST_P(DeviceTrainingTest, LearnsByHeart) {
  DevicePolicy policy(GetParam(), 1);
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    const ForwardBackwardResult result = policy.trainer().ForwardBackward(Request(1)).value();
    EXPECT_EQ(result.metrics.at("gradient_scale"), f16() ? 4096 : 1);  // 64 * 108 tokens, or less
    last = result.loss;
    if (step == 0) first = last;
    const OptimStepResult update = policy.trainer().OptimStep({.learning_rate = 3e-3f}).value();
    ASSERT_FALSE(update.skipped) << step << " " << update.skip_reason;
  }
  EXPECT_LT(last, first / 3);
}

// The second request of a step is larger than the first, which has fixed the scale, expects.
TEST_P(DeviceTrainingTest, AnOverflowIsSkippedAndLowersTheScale) {
  DevicePolicy policy(GetParam(), 1);
  const auto run = [&](float advantage) {
    const auto result = policy.trainer().ForwardBackward(Request(advantage)).value();
    return result.metrics.at("gradient_scale");
  };
  const double before = run(1);
  EXPECT_EQ(run(1e6f), before);
  const OptimStepResult update = policy.trainer().OptimStep({.learning_rate = 1e-3f}).value();
  EXPECT_EQ(update.skipped, f16()) << update.skip_reason;
  if (f16()) {
    const std::string next = absl::StrCat("gradient scale ", before, " is lowered");
    EXPECT_NE(update.skip_reason.find(next), std::string::npos) << update.skip_reason;
  }
  EXPECT_EQ(run(1), f16() ? before / 4 : 1);
  EXPECT_FALSE(policy.trainer().OptimStep({.learning_rate = 1e-3f}).value().skipped);
}

INSTANTIATE_TEST_SUITE_P(Devices, DeviceTrainingTest, testing::ValuesIn(kDevices));

}  // namespace
}  // namespace coppice
