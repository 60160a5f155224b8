#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/ops/ops.h"
#include "tests/support/device_test.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/reference.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

using reference::Vector;

using AdamWTest = DeviceTest;
INSTANTIATE_TEST_SUITE_P(Devices, AdamWTest, testing::ValuesIn(kDevices));

TEST_P(AdamWTest, MatchesTheFormulaOverSeveralSteps) {
  std::mt19937_64 random(1);
  const float lr = 0.01f, b1 = 0.9f, b2 = 0.95f, eps = 1e-8f, decay = 0.1f, clip = 0.5f;
  for (const int64_t n : {0, 64, 128, 40000 / 64 * 64}) {
    GuardedTensor param({n}), grad({n}), m({n}), v({n});
    param.FillNormal(random);
    std::vector<uint8_t> mask(n / 64);
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 2;
    Vector want = param.ToDouble(), want_m(n), want_v(n);
    for (int64_t t = 1; t <= 4; ++t) {
      grad.FillNormal(random);
      ASSERT_TRUE(ops_->AdamW({.param = param.view(),
                               .grad = grad.view(),
                               .m = m.view(),
                               .v = v.view(),
                               .decay_mask = View1D(mask.data(), DType::kU8, n / 64),
                               .step = t,
                               .learning_rate = lr,
                               .beta1 = b1,
                               .beta2 = b2,
                               .eps = eps,
                               .weight_decay = decay,
                               .grad_scale = clip})
                      .ok());
      for (int64_t i = 0; i < n; ++i) {
        const double g = double{grad[i]} * clip;
        want_m[i] = b1 * want_m[i] + (1 - double{b1}) * g;
        want_v[i] = b2 * want_v[i] + (1 - double{b2}) * g * g;
        const double step = want_m[i] / (1 - std::pow(double{b1}, t)) /
                            (std::sqrt(want_v[i] / (1 - std::pow(double{b2}, t))) + eps);
        want[i] -= lr * (step + (mask[i / 64] ? decay * want[i] : 0.0));
      }
    }
    EXPECT_LT(RelativeError(param, want), tolerance::kOpForward);
    EXPECT_LT(RelativeError(m, want_m), tolerance::kOpForward);
    EXPECT_LT(RelativeError(v, want_v), tolerance::kOpForward);
    for (const GuardedTensor* t : {&param, &m, &v}) t->ExpectGuardsIntact("arena");
  }
}

// bf16 values of `x` for a gradient, and the same numbers in f32.
std::vector<uint16_t> RoundToBf16(GuardedTensor& x) {
  std::vector<uint16_t> bits(x.size());
  for (int64_t i = 0; i < x.size(); ++i) {
    const uint32_t upper = std::bit_cast<uint32_t>(x[i]) & 0xffff0000u;
    bits[i] = static_cast<uint16_t>(upper >> 16);
    x[i] = std::bit_cast<float>(upper);
  }
  return bits;
}

TEST_P(AdamWTest, TakesGradientsInBf16) {
  std::mt19937_64 random(4);
  const int64_t n = 40000 / 64 * 64;
  GuardedTensor param({n}), m({n}), v({n}), grad({n});
  param.FillNormal(random);
  grad.FillNormal(random);
  GuardedTensor same_param({n}), same_m({n}), same_v({n});
  for (int64_t i = 0; i < n; ++i) same_param[i] = param[i];
  std::vector<uint16_t> bits = RoundToBf16(grad);
  ops::AdamWParams p = {.param = param.view(),
                        .grad = View1D(bits.data(), DType::kBF16, n),
                        .m = m.view(),
                        .v = v.view(),
                        .learning_rate = 0.01f,
                        .weight_decay = 0.1f};
  ASSERT_TRUE(ops_->AdamW(p).ok());
  p.param = same_param.view();
  p.grad = grad.view();
  p.m = same_m.view();
  p.v = same_v.view();
  ASSERT_TRUE(ops_->AdamW(p).ok());
  EXPECT_EQ(param.ToFloat(), same_param.ToFloat());
  EXPECT_EQ(m.ToFloat(), same_m.ToFloat());
  EXPECT_EQ(v.ToFloat(), same_v.ToFloat());
}

TEST_P(AdamWTest, ZeroGradientAndNoDecayChangeNothing) {
  GuardedTensor param({64}), grad({64}), m({64}), v({64});
  param.Fill(3);
  ASSERT_TRUE(ops_->AdamW({.param = param.view(),
                           .grad = grad.view(),
                           .m = m.view(),
                           .v = v.view(),
                           .learning_rate = 1})
                  .ok());
  EXPECT_EQ(param.ToFloat(), std::vector<float>(64, 3));
}

TEST(SumSquaresTest, IsTheSameForEveryNumberOfThreads) {
  std::mt19937_64 random(2);
  for (const int64_t n : {0, 1, 15, 32767, 32768, 32769, 200001}) {
    GuardedTensor x({n});
    x.FillNormal(random);
    double want = 0;
    for (int64_t i = 0; i < n; ++i) want += double{x[i]} * x[i];
    double first = 0;
    for (const int threads : {1, 2, 4}) {
      const auto ops = std::move(ops::CreateOps("cpu", threads)).value();
      const auto got = ops->SumSquares(x.view());
      ASSERT_TRUE(got.ok());
      EXPECT_NEAR(*got, want, tolerance::kOpForward * want);
      if (threads == 1) first = *got;
      EXPECT_EQ(*got, first);
    }
  }
}

using SumSquaresDeviceTest = DeviceTest;
INSTANTIATE_TEST_SUITE_P(Devices, SumSquaresDeviceTest, testing::ValuesIn(kDevices));

TEST_P(SumSquaresDeviceTest, MatchesTheReference) {
  std::mt19937_64 random(3);
  for (const int64_t n : {1, 15, 32769, 2000001}) {
    GuardedTensor x({n});
    x.FillNormal(random);
    const auto got = ops_->SumSquares(x.view());
    ASSERT_TRUE(got.ok()) << got.status();
    const double want = reference::Dot(x.ToDouble(), x.ToDouble());
    EXPECT_NEAR(*got, want, tolerance::kOpForward * want);
  }
}

TEST_P(SumSquaresDeviceTest, TakesBf16) {
  std::mt19937_64 random(5);
  for (const int64_t n : {1, 15, 32769}) {
    GuardedTensor x({n});
    x.FillNormal(random);
    std::vector<uint16_t> bits = RoundToBf16(x);
    const auto got = ops_->SumSquares(View1D(bits.data(), DType::kBF16, n));
    ASSERT_TRUE(got.ok()) << got.status();
    const double want = reference::Dot(x.ToDouble(), x.ToDouble());
    EXPECT_NEAR(*got, want, tolerance::kOpForward * want);
  }
}

TEST_P(SumSquaresDeviceTest, ReportsNonFiniteValues) {
  GuardedTensor x({100});
  x[50] = NAN;
  EXPECT_TRUE(std::isnan(*ops_->SumSquares(x.view())));
  x[50] = INFINITY;
  EXPECT_TRUE(std::isinf(*ops_->SumSquares(x.view())));
}

}  // namespace
}  // namespace coppice
