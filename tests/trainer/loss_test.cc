#include "trainer/loss.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/tolerances.h"
#include "tests/trainer/naive_loss.h"
#include "tests/trainer/trainer_fixture.h"

namespace coppice {
namespace {

// What EvaluateSample makes of a batch.
struct Evaluation {
  double loss = 0;
  std::map<std::string, double> metrics;
  std::vector<SampleGradient> gradients;
  std::vector<SampleResult> results;
};

Evaluation Evaluate(const LossConfig& config, const std::vector<NaiveSample>& samples) {
  LossCounts counts;
  for (const NaiveSample& s : samples) counts.Add(s.sample);
  LossSums sums;
  Evaluation e;
  for (const NaiveSample& s : samples) {
    const std::vector<float> logprobs(s.logprobs.begin(), s.logprobs.end());
    const std::vector<float> entropy(s.entropy.begin(), s.entropy.end());
    const SampleView view{s.sample, logprobs, entropy, s.advantages};
    e.results.emplace_back();
    e.gradients.push_back(EvaluateSample(config, counts, view, sums, e.results.back()));
  }
  e.loss = sums.loss();
  e.metrics = sums.Metrics();
  return e;
}

NaiveSample RandomNaiveSample(Random& random) {
  const size_t n = Uniform(random, 1, 6);
  NaiveSample s;
  s.sample = RandomSample(random, std::vector<int32_t>(n, 1));
  const std::vector<float> logprobs = RandomFloats(random, n, -4.1f, 1);
  const std::vector<float> entropy = RandomFloats(random, n, 2, 0.3f);
  s.logprobs.assign(logprobs.begin(), logprobs.end());
  s.base = s.logprobs;
  s.entropy.assign(entropy.begin(), entropy.end());
  for (const float a : RandomFloats(random, n, 0, 1)) s.advantages.push_back(a);
  return s;
}

// One sample of one token with log ratio `log_ratio` and advantage `advantage`.
NaiveSample OneToken(double log_ratio, double advantage) {
  NaiveSample s;
  s.sample.tokens = {1};
  s.sample.old_logprobs = {-2};
  s.logprobs = s.base = {-2 + log_ratio};
  s.advantages = {advantage};
  s.entropy = {1};
  return s;
}

TEST(LossTest, ValuesAndDerivativesAgreeWithThePlainDefinitionForRandomSettings) {
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const LossConfig config = RandomLoss(random);
    std::vector<NaiveSample> samples;
    for (int64_t i = Uniform(random, 1, 4); i > 0; --i) {
      samples.push_back(RandomNaiveSample(random));
    }
    double mask = 0;
    for (const NaiveSample& s : samples) mask += s.mask_sum();
    if (mask == 0) continue;

    const Evaluation e = Evaluate(config, samples);
    ASSERT_NEAR(e.loss, NaiveLoss(config, samples),
                tolerance::kDoubleSums * (1 + std::abs(e.loss)));
    const double step = tolerance::kFiniteDifferenceStep;
    const auto difference = [&](double& x) {
      const double middle = x;
      x = middle + step;
      const double up = NaiveLoss(config, samples);
      x = middle - step;
      const double down = NaiveLoss(config, samples);
      x = middle;
      return (up - down) / (2 * step);
    };
    for (size_t i = 0; i < samples.size(); ++i) {
      for (size_t t = 0; t < samples[i].logprobs.size(); ++t) {
        const double d_logprob = difference(samples[i].logprobs[t]);
        const double d_entropy = difference(samples[i].entropy[t]);
        ASSERT_NEAR(e.gradients[i].d_logprobs[t], d_logprob,
                    tolerance::kLossDerivative * (1 + std::abs(d_logprob)));
        ASSERT_NEAR(e.gradients[i].d_entropy[t], d_entropy, tolerance::kLossDerivative);
      }
    }
  }
}

TEST(LossTest, ClipsGainsOnlyInTheDirectionOfTheAdvantage) {
  LossConfig config{.kind = LossConfig::Kind::kPpo, .clip_low = 0.2f, .clip_high = 0.28f};
  const double up = std::log(1.5), down = std::log(0.5);
  const Evaluation gain = Evaluate(config, {OneToken(up, 1)});
  EXPECT_NEAR(gain.loss, -1.28, tolerance::kOpForward);
  EXPECT_EQ(gain.gradients[0].d_logprobs[0], 0);
  EXPECT_EQ(gain.metrics.at("clip_high"), 1);
  const Evaluation loss = Evaluate(config, {OneToken(up, -1)});
  EXPECT_NEAR(loss.gradients[0].d_logprobs[0], 1.5, tolerance::kOpForward);
  EXPECT_EQ(loss.metrics.at("clip_high"), 0);
  const Evaluation avoided = Evaluate(config, {OneToken(down, -1)});
  EXPECT_NEAR(avoided.loss, 0.8, tolerance::kOpForward);
  EXPECT_EQ(avoided.metrics.at("clip_low"), 1);
}

TEST(LossTest, DualClipBoundsTheLossOfNegativeAdvantages) {
  LossConfig config{.kind = LossConfig::Kind::kGrpo, .clip_dual = 3.0f};
  const Evaluation e = Evaluate(config, {OneToken(std::log(5), -2)});
  EXPECT_NEAR(e.loss, 6, tolerance::kOpForward);
  EXPECT_EQ(e.gradients[0].d_logprobs[0], 0);
  EXPECT_EQ(e.metrics.at("clip_dual"), 1);
}

TEST(LossTest, WithoutOldLogprobsTheRatioIsOneAndTheGradientThePolicyGradient) {
  LossConfig config{.kind = LossConfig::Kind::kGrpo};
  NaiveSample s = OneToken(0.7, 2);
  s.sample.old_logprobs.clear();
  const Evaluation e = Evaluate(config, {s});
  EXPECT_EQ(e.loss, -2);
  EXPECT_EQ(e.gradients[0].d_logprobs[0], -2);
  EXPECT_EQ(e.metrics.at("ratio_mean"), 1);
  EXPECT_EQ(e.metrics.at("approx_kl"), 0);
}

TEST(LossTest, StaysFiniteAtExtremeRatiosAndStopsTheirGradient) {
  for (int kind = 0; kind <= static_cast<int>(LossConfig::Kind::kCispo); ++kind) {
    for (const double log_ratio : {-90.0, 90.0}) {
      LossConfig config{.kind = static_cast<LossConfig::Kind>(kind),
                        .kl = LossConfig::KlEstimator::kK3,
                        .kl_coef = 1};
      NaiveSample s = OneToken(log_ratio, -1);
      s.sample.ref_logprobs = {-2};
      const Evaluation e = Evaluate(config, {s});
      EXPECT_TRUE(std::isfinite(e.loss));
      EXPECT_TRUE(std::isfinite(e.gradients[0].d_logprobs[0]));
      EXPECT_LE(e.metrics.at("kl"), 10 + 90);
      EXPECT_LE(e.metrics.at("ratio_max"), std::exp(20.0) * 1.01);
    }
  }
}

TEST(LossTest, LeavesMaskedTokensOut) {
  LossConfig config{.kind = LossConfig::Kind::kCrossEntropy};
  NaiveSample s;
  s.sample.tokens = {1, 2, 3};
  s.sample.loss_mask = {1, 0, 1};
  s.logprobs = s.base = {-1, -100, -3};
  s.entropy = {1, 100, 2};
  s.advantages = {1, 1, 1};
  const Evaluation e = Evaluate(config, {s});
  EXPECT_EQ(e.loss, 2);
  EXPECT_EQ(e.results[0].entropy, 1.5);
  EXPECT_EQ(e.gradients[0].d_logprobs[1], 0);
  EXPECT_EQ(e.metrics.at("entropy"), 1.5);
}

TEST(LossTest, ReportsTheGapToTheSampler) {
  NaiveSample s;
  s.sample.tokens = {1, 2};
  s.sample.sampler_logprobs = {-1, -2.5f};
  s.logprobs = s.base = {-1.5, -2.25};
  s.entropy = {1, 1};
  s.advantages = {1, 1};
  const Evaluation e = Evaluate({}, {s});
  EXPECT_EQ(e.metrics.at("logprob_gap_mean"), 0.375);
  EXPECT_EQ(e.metrics.at("logprob_gap_max"), 0.5);
}

TEST(LossTest, AFullyMaskedBatchHasNoLossAndNoNan) {
  NaiveSample s = OneToken(0, 1);
  s.sample.loss_mask = {0};
  const Evaluation e = Evaluate({}, {s});
  EXPECT_EQ(e.loss, 0);
  for (const auto& [name, value] : e.metrics) EXPECT_TRUE(std::isfinite(value)) << name;
}

}  // namespace
}  // namespace coppice
