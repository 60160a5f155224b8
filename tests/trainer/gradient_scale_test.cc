#include "trainer/gradient_scale.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/trainer/trainer_fixture.h"

namespace coppice {
namespace {

double Fixed(GradientScale& scale, double largest) {
  scale.Forget();
  scale.Fix(largest);
  return scale.value();
}

TEST(GradientScaleTest, BringsTheLargestCoefficientTo64) {
  GradientScale scale(true);
  EXPECT_EQ(scale.value(), 1);
  EXPECT_EQ(Fixed(scale, 1), 64);
  EXPECT_EQ(Fixed(scale, 1.01), 32);
  EXPECT_EQ(Fixed(scale, 1.0 / 1024), 65536);
  EXPECT_EQ(Fixed(scale, 1e-30), 1 << 24);
  EXPECT_TRUE(scale.Learn(false));
  EXPECT_EQ(Fixed(scale, 1e-30), 1 << 22);
  scale.set_history({});
  EXPECT_EQ(Fixed(scale, 1e30), 1);
  EXPECT_EQ(Fixed(scale, std::numeric_limits<double>::infinity()), 1);
  EXPECT_EQ(Fixed(scale, std::numeric_limits<double>::quiet_NaN()), 1);
  GradientScale off(false);
  EXPECT_EQ(Fixed(off, 1), 1);
}

TEST(GradientScaleTest, StaysForAWholeStep) {
  GradientScale scale(true);
  scale.Fix(0);  // nothing but zeros: any scale is theirs
  scale.Fix(0.5);
  EXPECT_EQ(scale.value(), 128);
  scale.Fix(8);
  EXPECT_EQ(scale.value(), 128);
}

TEST(GradientScaleTest, FollowsWhatHappened) {
  GradientScale scale(true);
  EXPECT_EQ(Fixed(scale, 1), 64);
  EXPECT_TRUE(scale.Learn(false));
  EXPECT_EQ(Fixed(scale, 1), 16);
  EXPECT_TRUE(scale.Learn(false));
  EXPECT_TRUE((Fixed(scale, 1), scale.Learn(false)));
  EXPECT_EQ(Fixed(scale, 1), 1);
  EXPECT_FALSE(scale.Learn(false)) << "there is nothing to lower";
  EXPECT_EQ(Fixed(scale, 1), 1);
  double before = 1;
  for (int raised = 0; raised < 6; ++raised) {
    for (int i = 0; i < 99; ++i) EXPECT_TRUE(scale.Learn(true));
    EXPECT_EQ(Fixed(scale, 1), before);
    EXPECT_TRUE(scale.Learn(true));
    EXPECT_EQ(Fixed(scale, 1), before *= 2);
  }
  for (int i = 0; i < 200; ++i) EXPECT_TRUE(scale.Learn(true));
  EXPECT_EQ(Fixed(scale, 1), 64) << "no more than asked for";
}

TEST(GradientScaleTest, LearnsNothingWhileOff) {
  const GradientScale::History history{.exponent = -6, .finite_norms = 7};
  GradientScale off(false);
  off.set_history(history);
  for (int i = 0; i < 250; ++i) EXPECT_TRUE(off.Learn(true));
  EXPECT_EQ(off.history(), history);
  EXPECT_FALSE(off.Learn(false));
  EXPECT_EQ(off.history(), history);
}

TEST(GradientScaleTest, ZerosChooseNone) {
  GradientScale scale(true), off(false);
  EXPECT_TRUE(off.chosen());
  scale.Fix(0);
  EXPECT_FALSE(scale.chosen());
  scale.Fix(1);
  EXPECT_TRUE(scale.chosen());
  scale.Forget();
  EXPECT_FALSE(scale.chosen());
}

ModelConfig ConfigOf(uint64_t seed) {
  const auto architecture = static_cast<Architecture>(seed % 3);
  return TinyConfig(architecture, architecture == Architecture::kQwen2);
}

// In f32 a power of two changes no bit: not of what the caller sees, not of the weights.
TEST(GradientScaleTest, ScaledUpdatesHaveTheBitsOfUnscaledOnes) {
  int num_scaled = 0;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    Random random(seed);
    TinyPolicy plain(ConfigOf(seed), seed), scaled(ConfigOf(seed), seed, {.scale_gradients = true});
    for (int step = 0; step < 3; ++step) {
      for (int64_t calls = Uniform(random, 1, 2); calls > 0; --calls) {
        const ForwardBackwardRequest request = RandomRequest(random, plain.config().vocab);
        const auto want = plain.trainer().ForwardBackward(request).value();
        const auto got = scaled.trainer().ForwardBackward(request).value();
        EXPECT_EQ(got.loss, want.loss);
        EXPECT_EQ(want.metrics.at("gradient_scale"), 1);
        const auto used = got.metrics.find("gradient_scale");
        if (used != got.metrics.end()) {
          EXPECT_EQ(used->second, scaled.trainer().gradient_scale());
        }
      }
      const double scale = scaled.trainer().gradient_scale();
      num_scaled += scale > 1;  // but where every token is masked
      std::vector<float> gradients = scaled.Gradients();
      for (float& g : gradients) g /= static_cast<float>(scale);
      EXPECT_EQ(gradients, plain.Gradients());
      const AdamConfig adam = {
          .learning_rate = 1e-3f, .weight_decay = 0.1f, .grad_clip_norm = step == 0 ? 0.0f : 0.5f};
      EXPECT_EQ(scaled.trainer().OptimStep(adam).value().grad_norm,
                plain.trainer().OptimStep(adam).value().grad_norm);
      EXPECT_EQ(scaled.Weights(), plain.Weights());
    }
  }
  EXPECT_GT(num_scaled, 80);
}

// Cut into a prompt and micro-batches of its branches.
TEST(GradientScaleTest, EveryMicroBatchHasTheScaleOfItsRequest) {
  TrainGroup group{.prompt = std::vector<int32_t>(20, 3)};
  for (int32_t i = 0; i < 8; ++i) {
    group.samples.push_back({.tokens = std::vector<int32_t>(9, i),
                             .advantages = {1.0f - 0.3f * static_cast<float>(i)}});
  }
  ForwardBackwardRequest request;
  request.groups = {group};
  std::vector<float> weights[2];
  for (const bool scaled : {false, true}) {
    TinyPolicy policy(ConfigOf(0), 1, {.max_rows = 24, .scale_gradients = scaled});
    const auto result = policy.trainer().ForwardBackward(request).value();
    EXPECT_GT(result.metrics.at("micro_batches"), 1);
    EXPECT_FALSE(policy.trainer().OptimStep({.learning_rate = 1e-3f}).value().skipped);
    weights[scaled] = policy.Weights();
  }
  EXPECT_EQ(weights[0], weights[1]);
}

TEST(GradientScaleTest, ACheckpointHoldsWhatStepsHaveTaught) {
  const std::string path = absl::StrCat(testing::TempDir(), "coppice_scale_", getpid());
  Random random(7);
  TinyPolicy policy(ConfigOf(0), 1, {.scale_gradients = true});
  const ForwardBackwardRequest request = RandomRequest(random, policy.config().vocab);
  ASSERT_TRUE(policy.trainer().ForwardBackward(request).ok());
  policy.DropGradients();  // by a norm that is not finite
  const auto scale_of_step = [&](TinyPolicy& p) {
    const double scale = p.trainer().ForwardBackward(request).value().metrics.at("gradient_scale");
    EXPECT_FALSE(p.trainer().OptimStep({}).value().skipped);
    return scale;
  };
  double scale = 0;
  for (int i = 0; i < 60; ++i) scale = scale_of_step(policy);
  ASSERT_TRUE(policy.trainer().SaveCheckpoint(path).ok());
  TinyPolicy resumed(ConfigOf(0), 2, {.scale_gradients = true});
  ASSERT_TRUE(resumed.trainer().LoadCheckpoint(path).ok());
  for (int i = 60; i < 100; ++i) EXPECT_EQ(scale_of_step(resumed), scale) << i;
  EXPECT_EQ(scale_of_step(resumed), 2 * scale) << "after 100 finite norms";
  EXPECT_GT(scale, 1);
  std::filesystem::remove_all(path);
}

TEST(GradientScaleTest, IsNotReportedWithoutAdvantages) {
  TinyPolicy policy(ConfigOf(0), 1, {.scale_gradients = true});
  ForwardBackwardRequest request;
  request.groups = {{.prompt = {1, 2, 3}, .samples = {{.tokens = {4, 5}, .advantages = {0}}}}};
  const auto run = [&](float advantage) {
    request.groups[0].samples[0].advantages = {advantage};
    return policy.trainer().ForwardBackward(request).value().metrics;
  };
  EXPECT_EQ(run(0).count("gradient_scale"), 0u);
  const double scale = run(1).at("gradient_scale");
  EXPECT_GT(scale, 1);
  EXPECT_EQ(run(0).at("gradient_scale"), scale) << "the step has one";
}

// What activations spoil, no scale would mend.
TEST(GradientScaleTest, StaysWhereLogprobsAreNotFinite) {
  TinyPolicy policy(ConfigOf(0), 1, {.scale_gradients = true});
  ForwardBackwardRequest request;
  request.groups = {{.prompt = {1, 2, 3}, .samples = {{.tokens = {4, 5}, .advantages = {1}}}}};
  float& weight = policy.model().params.embedding.f32()[3 * policy.config().hidden];
  const float before = std::exchange(weight, std::numeric_limits<float>::quiet_NaN());
  const double scale =
      policy.trainer().ForwardBackward(request).value().metrics.at("gradient_scale");
  EXPECT_GT(scale, 4);
  const OptimStepResult update = policy.trainer().OptimStep({}).value();
  EXPECT_TRUE(update.skipped);
  EXPECT_NE(update.skip_reason.find("log-probs are not finite"), std::string::npos)
      << update.skip_reason;
  weight = before;
  const auto scale_of_next = [&] {
    return policy.trainer().ForwardBackward(request).value().metrics.at("gradient_scale");
  };
  EXPECT_EQ(scale_of_next(), scale);
  policy.DropGradients();  // by a norm that is not finite, of a loss that is
  EXPECT_EQ(scale_of_next(), scale / 4);
}

TEST(GradientScaleTest, ASkippedUpdateLowersTheNextScale) {
  TinyPolicy policy(ConfigOf(0), 1, {.scale_gradients = true});
  Random random(7);
  const ForwardBackwardRequest request = RandomRequest(random, policy.config().vocab);
  const auto scale = [&] {
    return policy.trainer().ForwardBackward(request).value().metrics.at("gradient_scale");
  };
  const double first = scale();
  policy.DropGradients();  // by a norm that is not finite
  EXPECT_EQ(scale(), first / 4);
  EXPECT_FALSE(policy.trainer().OptimStep({}).value().skipped);
  EXPECT_EQ(scale(), first / 4);
}

}  // namespace
}  // namespace coppice
