#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/base/float16.h"
#include "kernels/ops/ops.h"
#include "tests/support/device_test.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/reference.h"
#include "tests/support/share.h"
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

// A parameter of 16 bits and its remainder.
struct Master {
  uint16_t param = 0;
  int16_t remainder = 0;

  friend bool operator==(const Master&, const Master&) = default;
};

// The formulas of ops::AdamWParams, in double precision.
double F16Step(uint16_t f16) { return std::ldexp(1.0, std::max(f16 >> 10 & 31, 1) - 25); }

Master Split(DType dtype, float x) {
  if (dtype == DType::kBF16) {  // nearest, halves away from zero
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint16_t param = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    return {param, static_cast<int16_t>(int64_t{bits} - (int64_t{param} << 16))};
  }
  const float held = std::clamp(x, -65504.0f, 65504.0f);
  const uint16_t param = F16FromFloat(held);
  const double rest = (double{held} - FloatFromF16(param)) / (F16Step(param) * 0x1p-16);
  return {param, static_cast<int16_t>(std::clamp(std::nearbyint(rest), -32767.0, 32767.0))};
}
float Join(DType dtype, const Master& master) {
  if (dtype == DType::kBF16) {
    const int64_t bits = (int64_t{master.param} << 16) + master.remainder;
    return std::bit_cast<float>(static_cast<uint32_t>(bits));
  }
  return static_cast<float>(FloatFromF16(master.param) +
                            master.remainder * F16Step(master.param) * 0x1p-16);
}

class MastersTest : public DeviceTest {
 protected:
  DType dtype() const { return ComputeDType(GetParam()); }

  struct Arena {
    Arena(DType dtype, const std::vector<float>& masters)
        : m({static_cast<int64_t>(masters.size())}), v({static_cast<int64_t>(masters.size())}) {
      for (const float x : masters) {
        const Master master = Split(dtype, x);
        param.push_back(master.param);
        remainder.push_back(master.remainder);
      }
    }
    std::vector<uint16_t> param;
    std::vector<int16_t> remainder;
    GuardedTensor m, v;
  };
  float Value(const Arena& arena, size_t i) const {
    return Join(dtype(), {arena.param[i], arena.remainder[i]});
  }
  // `p` has everything but the arena's tensors.
  absl::Status Step(ops::AdamWParams p, Arena& arena) {
    const auto n = static_cast<int64_t>(arena.param.size());
    p.param = View1D(arena.param.data(), dtype(), n);
    p.master_remainder = View1D(arena.remainder.data(), DType::kBF16, n);
    p.m = arena.m.view();
    p.v = arena.v.view();
    return ops_->AdamW(p);
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, MastersTest, testing::ValuesIn(kCudaDevices));

// Where parameters change how they round: steps of f16 and bf16, halves of them, ends of binades,
// the largest and the smallest numbers.
std::vector<float> MastersAtEdges() {
  std::vector<float> edges = {0, 65504, 65505, 65519.996f, 65520, 65536, 100000};
  const auto around = [&](float x) {
    for (const float y : {x, std::nextafter(x, 0.0f), std::nextafter(x, INFINITY)})
      edges.push_back(y);
  };
  for (int e = -30; e <= 15; ++e) {
    const float power = std::ldexp(1.0f, e);
    for (const int half_steps : {-3, -2, -1, 0, 1, 2, 3, 1025, 2045, 2047}) {
      around(power * (1 + static_cast<float>(half_steps) / 2048));
      around(power * (1 + static_cast<float>(half_steps) / 256));
    }
  }
  for (const int odd_even : {1, 2, 3, 5, 2046, 2047}) {  // halves of steps below 2^-14
    around(std::ldexp(static_cast<float>(odd_even), -25));
  }
  for (int i = 0; i < 64; ++i) edges.push_back(std::ldexp(1.0f + static_cast<float>(i) / 64, -18));
  return edges;
}

TEST_P(MastersTest, AreRoundedToNearestAndKeepTheRest) {
  std::vector<float> wanted = MastersAtEdges();
  std::mt19937_64 random(6);
  std::uniform_real_distribution<float> exponent(-27, 17), fraction(1, 2);
  for (int i = 0; i < 20000; ++i) {
    wanted.push_back(std::ldexp(fraction(random), static_cast<int>(exponent(random))));
  }
  for (size_t i = wanted.size(); i-- > 0;) wanted.push_back(-wanted[i]);
  wanted.resize((wanted.size() + 63) / 64 * 64);
  std::vector<float> halves;
  for (const float x : wanted) halves.push_back(x / 2);
  Arena arena(dtype(), halves);
  std::vector<float> doubled;
  for (size_t i = 0; i < wanted.size(); ++i) doubled.push_back(2 * Value(arena, i));
  GuardedTensor no_grad({static_cast<int64_t>(wanted.size())});
  // Decay by -1 and no gradient: x - (-x).
  ASSERT_TRUE(Step({.grad = no_grad.view(), .learning_rate = 1, .weight_decay = -1}, arena).ok());
  for (size_t i = 0; i < wanted.size(); ++i) {
    const Master got = {arena.param[i], arena.remainder[i]};
    ASSERT_EQ(got, Split(dtype(), doubled[i])) << wanted[i];
    const bool f16 = dtype() == DType::kF16;
    if (f16 && std::abs(wanted[i]) > 65504) {
      ASSERT_EQ(Join(dtype(), got), std::copysign(65504.0f, wanted[i])) << wanted[i];
    } else if (!f16 || std::abs(wanted[i]) >= 0x1p-15f) {  // its half is held exactly, too
      ASSERT_EQ(Join(dtype(), got), wanted[i]);
    } else {
      ASSERT_NEAR(Join(dtype(), got), wanted[i], 0x1p-38) << wanted[i];
    }
  }
}

TEST_P(MastersTest, TakeTheStepsOfF32BitForBit) {
  constexpr int64_t kElements = 8192;
  std::mt19937_64 random(7);
  std::vector<float> masters;
  std::uniform_real_distribution<float> exponent(-9, 3), fraction(1, 2);
  for (int64_t i = 0; i < kElements; ++i) {
    const float x = std::ldexp(fraction(random), static_cast<int>(exponent(random)));
    masters.push_back(i % 2 == 0 ? x : -x);
  }
  Arena arena(dtype(), masters);
  const std::vector<uint16_t> params_before = arena.param;
  GuardedTensor f32({kElements}), m({kElements}), v({kElements}), grad({kElements});
  std::copy(masters.begin(), masters.end(), &f32[0]);
  std::vector<uint8_t> mask(kElements / 64);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 2;
  ops::AdamWParams p = {.decay_mask = View1D(mask.data(), DType::kU8, kElements / 64),
                        .learning_rate = 1e-6f,
                        .weight_decay = 0.1f,
                        .grad_scale = 0.5f};
  for (p.step = 1; p.step <= Repeats(24); ++p.step) {
    grad.FillNormal(random);
    p.grad = grad.view();
    ASSERT_TRUE(Step(p, arena).ok());
    p.param = f32.view();
    p.m = m.view();
    p.v = v.view();
    ASSERT_TRUE(ops_->AdamW(p).ok());
    for (int64_t i = 0; i < kElements; ++i) {
      ASSERT_EQ(Value(arena, i), f32[i]) << "element " << i << " step " << p.step;
    }
  }
  EXPECT_EQ(arena.m.ToFloat(), m.ToFloat());
  EXPECT_EQ(arena.v.ToFloat(), v.ToFloat());
  int64_t same_params = 0, moved = 0;
  for (int64_t i = 0; i < kElements; ++i) {
    same_params += arena.param[i] == params_before[i];
    moved += f32[i] != masters[i];
  }
  EXPECT_GT(moved, kElements * 3 / 4);
  EXPECT_GT(same_params, kElements / 2) << "steps are to be smaller than those of 16 bits";
}

TEST_P(MastersTest, NanStays) {
  Arena arena(dtype(), std::vector<float>(64, 1.0f));
  GuardedTensor grad({64});
  grad[5] = NAN;
  ASSERT_TRUE(Step({.grad = grad.view(), .learning_rate = 1e-3f}, arena).ok());
  EXPECT_TRUE(std::isnan(Value(arena, 5)));
  EXPECT_EQ(Value(arena, 4), 1);
}

TEST_P(MastersTest, F16TakesNoGradientsInBf16) {
  Arena arena(dtype(), std::vector<float>(64, 1.0f));
  std::vector<uint16_t> bits(64);
  const absl::Status status =
      Step({.grad = View1D(bits.data(), DType::kBF16, 64), .learning_rate = 1}, arena);
  EXPECT_EQ(status.code(),
            dtype() == DType::kF16 ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kOk);
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
