// Products with SwiGLU behind them, forward and backward, with as many rows as prefill and training
// have: there backends fold the activation into the product.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/ops/ops.h"
#include "tests/support/device_test.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/reference.h"
#include "tests/support/share.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

using reference::Vector;

struct Shape {
  int64_t rows, ffn, k;
};
// Few rows and many; less than a tile of columns, ragged ends, several tiles; sums of less than a
// step and of several.
std::vector<Shape> Shapes() {
  return Share(Scaled<std::vector<Shape>>(
      {{1, 8, 8},
       {130, 72, 40},
       {1024, 8, 64},
       {1025, 136, 72},
       {1100, 264, 8},
       {1283, 40, 200},
       {3100, 16, 24}},
      {{1, 8, 8}, {1024, 8, 64}, {1025, 136, 72}, {1100, 264, 8}, {1283, 40, 200}}));
}

Vector SwiGluGradient(const Vector& gate_up, const Vector& d, int64_t rows, int64_t ffn) {
  Vector gradient(gate_up.size());
  for (int64_t i = 0; i < rows * ffn; ++i) {
    const int64_t at = i / ffn * 2 * ffn + i % ffn;
    const double gate = gate_up[at], up = gate_up[at + ffn], s = 1 / (1 + std::exp(-gate));
    gradient[at] = d[i] * up * s * (1 + gate * (1 - s));
    gradient[at + ffn] = d[i] * gate * s;
  }
  return gradient;
}

class GatedMatMulTest : public DeviceTest {
 protected:
  std::mt19937_64 random_{23};
};
INSTANTIATE_TEST_SUITE_P(Devices, GatedMatMulTest, testing::ValuesIn(kDevices));

struct Forward {
  GuardedTensor a, b, gate_up, out;

  Forward(const Shape& s, std::mt19937_64& random)
      : a({s.rows, s.k}, 8),
        b({2 * s.ffn, s.k}, 16),
        gate_up({s.rows, 2 * s.ffn}, 8),
        out({s.rows, s.ffn}, 24) {
    a.FillNormal(random);
    b.FillNormal(random, 1 / std::sqrt(static_cast<float>(s.k)));
  }
  void ExpectGuardsIntact() {
    gate_up.ExpectGuardsIntact("gate_up");
    out.ExpectGuardsIntact("out");
  }
};

TEST_P(GatedMatMulTest, ForwardMatchesReferenceWhateverIsKept) {
  for (const Shape& s : Shapes()) {
    SCOPED_TRACE(testing::Message() << s.rows << " x " << s.ffn << " x " << s.k);
    Forward t(s, random_), acts(s, random_), gates(s, random_);
    const Vector want =
        reference::MatMul(t.a.ToDouble(), t.b.ToDouble(), s.rows, 2 * s.ffn, s.k, false, true);
    ops::MatMulSwiGluParams p = {
        .a = t.a.view(), .b = t.b.view(), .gate_up = t.gate_up.view(), .out = t.out.view()};
    absl::Status status = ops_->MatMulSwiGlu(p);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_LT(RelativeError(t.gate_up, want), forward_tolerance());
    EXPECT_LT(RelativeError(t.out, reference::SwiGlu(want, s.rows, s.ffn)), backward_tolerance());
    t.ExpectGuardsIntact();

    p.gate_up = acts.gate_up.view();
    p.out = acts.out.view();
    p.keep_gate_up = false;
    status = ops_->MatMulSwiGlu(p);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(acts.out.ToFloat(), t.out.ToFloat());
    acts.ExpectGuardsIntact();

    p.gate_up = gates.gate_up.view();
    p.out = {};
    p.keep_gate_up = true;
    status = ops_->MatMulSwiGlu(p);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(gates.gate_up.ToFloat(), t.gate_up.ToFloat());
    gates.ExpectGuardsIntact();
  }
}

TEST_P(GatedMatMulTest, BackwardMatchesReferenceInPlace) {
  for (const Shape& s : Shapes()) {
    SCOPED_TRACE(testing::Message() << s.rows << " x " << s.ffn << " x " << s.k);
    GuardedTensor d_y({s.rows, s.k}, 8), b({s.k, s.ffn}, 16), gate_up({s.rows, 2 * s.ffn}, 8);
    GuardedTensor d_gate_up({s.rows, 2 * s.ffn}, 8), out({s.rows, s.ffn}, 24);
    for (GuardedTensor* t : {&d_y, &gate_up}) t->FillNormal(random_);
    b.FillNormal(random_, 1 / std::sqrt(static_cast<float>(s.k)));
    const Vector d =
        reference::MatMul(d_y.ToDouble(), b.ToDouble(), s.rows, s.ffn, s.k, false, false);
    const Vector want = SwiGluGradient(gate_up.ToDouble(), d, s.rows, s.ffn);
    const Vector want_out = reference::SwiGlu(gate_up.ToDouble(), s.rows, s.ffn);
    ops::MatMulSwiGluBackwardParams p = {.d_y = d_y.view(),
                                         .b = b.view(),
                                         .gate_up = gate_up.view(),
                                         .d_gate_up = d_gate_up.view(),
                                         .out = out.view()};
    absl::Status status = ops_->MatMulSwiGluBackward(p);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_LT(RelativeError(d_gate_up, want), backward_tolerance());
    EXPECT_LT(RelativeError(out, want_out), forward_tolerance());
    d_gate_up.ExpectGuardsIntact("d_gate_up");
    out.ExpectGuardsIntact("out");

    p.d_gate_up = gate_up.view();
    status = ops_->MatMulSwiGluBackward(p);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(gate_up.ToFloat(), d_gate_up.ToFloat());
    gate_up.ExpectGuardsIntact("gate_up");
  }
}

TEST_P(GatedMatMulTest, ShapesThatDoNotMatchAreRefused) {
  constexpr int64_t kRows = 1024;
  GuardedTensor a({kRows, 16}), b({64, 16}), gate_up({kRows, 64}), out({kRows, 24});
  EXPECT_EQ(ops_->MatMulSwiGlu(
                    {.a = a.view(), .b = b.view(), .gate_up = gate_up.view(), .out = out.view()})
                .code(),
            absl::StatusCode::kInvalidArgument);
  GuardedTensor down({16, 24});
  EXPECT_EQ(ops_->MatMulSwiGluBackward({.d_y = a.view(),
                                        .b = down.view(),
                                        .gate_up = gate_up.view(),
                                        .d_gate_up = gate_up.view(),
                                        .out = out.view()})
                .code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace coppice
