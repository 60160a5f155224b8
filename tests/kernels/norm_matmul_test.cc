// Products of few rows with weights, alone and with the norm before or the activation behind them:
// what decoding is made of, where backends take ways of their own.
#include <gtest/gtest.h>

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

using Counts = std::vector<int64_t>;

constexpr float kEps = 1e-5f;

struct Shape {
  int64_t rows, n, k;
};
// Rows around every size a backend rounds up to; weights of less than a tile, with ragged ends, and
// of more tiles than there are multiprocessors.
std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  for (const int64_t rows : {1, 7, 8, 9, 16, 17, 32, 33, 48, 64, 65}) {
    for (const auto& [n, k] : {std::pair{2, 8}, {64, 64}, {130, 72}, {192, 576}, {50, 2000}}) {
      shapes.push_back({rows, n, k});
    }
  }
  shapes.push_back({3, 9000, 136});
  shapes.push_back({64, 9000, 136});
  return Share(Scaled(shapes, {{1, 2, 8},
                               {4, 50, 2000},
                               {8, 130, 72},
                               {9, 130, 72},
                               {16, 50, 2000},
                               {17, 130, 72},
                               {33, 2, 8},
                               {33, 130, 72},
                               {64, 50, 2000},
                               {65, 130, 72}}));
}

class NormMatMulTest : public DeviceTest {
 protected:
  NormMatMulTest() : random_(17) {}

  // The normed rows are rounded before the product is.
  double ChainTolerance() const { return on_cuda() ? backward_tolerance() : forward_tolerance(); }
  double Tolerance(bool bias) const { return bias ? bias_tolerance() : forward_tolerance(); }
  std::mt19937_64 random_;
};
INSTANTIATE_TEST_SUITE_P(Devices, NormMatMulTest, testing::ValuesIn(kDevices));

TEST_P(NormMatMulTest, ProductsWithParametersMatchReference) {
  for (const auto& [rows, n, k] : Shapes()) {
    for (const int extras : {0, 1, 2, 3}) {
      SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k << " extras " << extras);
      GuardedTensor a({rows, k}, 8), b({n, k}, 16), bias({n}), c({rows, n}, 2);
      for (GuardedTensor* t : {&a, &b, &bias, &c}) t->FillNormal(random_);
      Vector want = reference::MatMul(a.ToDouble(), b.ToDouble(), rows, n, k, false, true);
      for (int64_t i = 0; i < rows * n; ++i) {
        want[i] += (extras & 1 ? bias[i % n] : 0) + (extras & 2 ? c[i] : 0);
      }
      const absl::Status status = ops_->MatMul({.a = a.view(),
                                                .b = b.view(),
                                                .trans_b = true,
                                                .bias = extras & 1 ? bias.view() : TensorView{},
                                                .addend = extras & 2 ? c.view() : TensorView{},
                                                .c = c.view(),
                                                .b_is_parameter = true});
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_LT(RelativeError(c, want), Tolerance(extras & 1));
      c.ExpectGuardsIntact("c");
    }
  }
}

TEST_P(NormMatMulTest, NormMatMulMatchesReference) {
  for (const auto& [rows, n, k] : Shapes()) {
    for (const bool with_bias : {false, true}) {
      for (const bool backward_follows : {false, true}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k << " bias " << with_bias
                                        << " backward " << backward_follows);
        GuardedTensor x({rows, k}, 8), weight({k}), b({n, k}), bias({n}), c({rows, n}, 4);
        GuardedTensor normed({rows, k}), rstd({rows});
        for (GuardedTensor* t : {&x, &weight, &b, &bias}) t->FillNormal(random_);
        const Vector want_normed = reference::RmsNorm(x.ToDouble(), weight.ToDouble(), kEps);
        Vector want = reference::MatMul(want_normed, b.ToDouble(), rows, n, k, false, true);
        for (int64_t i = 0; i < rows * n && with_bias; ++i) want[i] += bias[i % n];
        const absl::Status status =
            ops_->NormMatMul({.norm = {.x = x.view(),
                                       .weight = weight.view(),
                                       .eps = kEps,
                                       .out = normed.view(),
                                       .rstd = backward_follows ? rstd.view() : TensorView{}},
                              .b = b.view(),
                              .bias = with_bias ? bias.view() : TensorView{},
                              .c = c.view()});
        ASSERT_TRUE(status.ok()) << status;
        EXPECT_LT(RelativeError(c, want), ChainTolerance());
        c.ExpectGuardsIntact("c");
        if (backward_follows) {
          EXPECT_LT(RelativeError(normed, want_normed), forward_tolerance());
        }
      }
    }
  }
}

// Rows and norms so large that a 16-bit type may hold the normed rows, but not x * norm.
TEST_P(NormMatMulTest, LargeRowsAreNormed) {
  for (const int64_t rows : {1, 4, 9}) {
    SCOPED_TRACE(testing::Message() << rows << " rows");
    const int64_t n = 72, k = 264;
    GuardedTensor x({rows, k}), weight({k}), b({n, k}), c({rows, n}), normed({rows, k});
    x.FillNormal(random_, 0x1p13f);
    weight.FillNormal(random_, 4);
    b.FillNormal(random_);
    const Vector want = reference::MatMul(reference::RmsNorm(x.ToDouble(), weight.ToDouble(), kEps),
                                          b.ToDouble(), rows, n, k, false, true);
    const absl::Status status = ops_->NormMatMul(
        {.norm = {.x = x.view(), .weight = weight.view(), .eps = kEps, .out = normed.view()},
         .b = b.view(),
         .c = c.view()});
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_LT(RelativeError(c, want), ChainTolerance());
  }
}

TEST_P(NormMatMulTest, NormSwiGluMatchesReference) {
  for (const auto& [rows, ffn, k] : Shapes()) {
    for (const bool backward_follows : {false, true}) {
      SCOPED_TRACE(testing::Message()
                   << rows << " x " << ffn << " x " << k << " backward " << backward_follows);
      GuardedTensor x({rows, k}), weight({k}), b({2 * ffn, k}), gate_up({rows, 2 * ffn});
      GuardedTensor normed({rows, k}), rstd({rows}), out({rows, ffn}, 2);
      for (GuardedTensor* t : {&x, &weight}) t->FillNormal(random_);
      b.FillNormal(random_, 1 / std::sqrt(static_cast<float>(k)));
      const Vector want_normed = reference::RmsNorm(x.ToDouble(), weight.ToDouble(), kEps);
      const Vector want_gate_up =
          reference::MatMul(want_normed, b.ToDouble(), rows, 2 * ffn, k, false, true);
      const Vector want = reference::SwiGlu(want_gate_up, rows, ffn);
      const absl::Status status =
          ops_->NormSwiGlu({.norm = {.x = x.view(),
                                     .weight = weight.view(),
                                     .eps = kEps,
                                     .out = normed.view(),
                                     .rstd = backward_follows ? rstd.view() : TensorView{}},
                            .b = b.view(),
                            .gate_up = gate_up.view(),
                            .out = out.view()});
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_LT(RelativeError(out, want), backward_tolerance());
      out.ExpectGuardsIntact("out");
      if (backward_follows) {
        EXPECT_LT(RelativeError(gate_up, want_gate_up), ChainTolerance());
      }
    }
  }
}

TEST_P(NormMatMulTest, ShapesThatDoNotMatchAreRefused) {
  GuardedTensor x({4, 64}), weight({64}), short_weight({56}), b({128, 64}), c({4, 120});
  GuardedTensor normed({4, 64}), gate_up({4, 128});
  const ops::RmsNormParams norm = {.x = x.view(), .weight = weight.view(), .out = normed.view()};
  EXPECT_EQ(ops_->NormMatMul({.norm = norm, .b = b.view(), .c = c.view()}).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      ops_->NormSwiGlu({.norm = norm, .b = b.view(), .gate_up = gate_up.view(), .out = c.view()})
          .code(),
      absl::StatusCode::kInvalidArgument);
  const ops::RmsNormParams bad = {
      .x = x.view(), .weight = short_weight.view(), .out = normed.view()};
  EXPECT_EQ(ops_->NormMatMul({.norm = bad, .b = b.view(), .c = gate_up.view()}).code(),
            absl::StatusCode::kInvalidArgument);
}

// A tensor of the device in any type, from host floats and back.
class DeviceTensor {
 public:
  DeviceTensor(ops::Ops& ops, const GuardedTensor& host, DType dtype) : ops_(ops) {
    const std::vector<float> values = host.ToFloat();
    const int64_t n = static_cast<int64_t>(values.size());
    floats_ = std::move(ops.Allocate(n * 4, "floats")).value();
    own_ = std::move(ops.Allocate(n * SizeOf(dtype), "own")).value();
    view_ = View2D(own_.data(), dtype, host.view().dim(0), n / host.view().dim(0));
    EXPECT_TRUE(ops.Upload(values.data(), Floats()).ok());
    EXPECT_TRUE(ops.Copy(Floats(), view_).ok());
    EXPECT_TRUE(ops.Synchronize().ok());
  }
  TensorView view() const { return view_; }
  std::vector<float> Download() {
    std::vector<float> values(view_.num_elements());
    EXPECT_TRUE(ops_.Copy(view_, Floats()).ok());
    EXPECT_TRUE(ops_.Download(Floats(), values.data()).ok());
    return values;
  }

 private:
  TensorView Floats() const {
    return View2D(floats_.data(), DType::kF32, view_.dim(0), view_.dim(1));
  }
  ops::Ops& ops_;
  DeviceBuffer floats_, own_;
  TensorView view_;
};

double RelativeError(DeviceTensor& got, const Vector& want) {
  GuardedTensor host({got.view().dim(0), got.view().dim(1)});
  const std::vector<float> values = got.Download();
  for (size_t i = 0; i < values.size(); ++i) host[static_cast<int64_t>(i)] = values[i];
  return RelativeError(host, want);
}

// The residual stream is f32 where the products' operands are not.
TEST_P(NormMatMulTest, NormReadsF32Rows) {
  const auto ops = std::move(CreateTestOps(GetParam(), 2)).value();
  const DType f = ops->Info().compute_dtype;
  for (const int64_t rows :
       Share(Scaled<Counts>({1, 4, 5, 8, 9, 16, 17, 32, 33, 64}, {1, 4, 5, 33}))) {
    for (const auto& [n, k] : {std::pair{2, 8}, {130, 72}, {192, 2560}}) {
      SCOPED_TRACE(testing::Message() << rows << " x " << n << " x " << k);
      GuardedTensor x({rows, k}), weight({1, k}), b({2 * n, k}), out({rows, 2 * n});
      for (GuardedTensor* t : {&x, &weight}) t->FillNormal(random_);
      b.FillNormal(random_, 1 / std::sqrt(static_cast<float>(k)));
      const Vector normed = reference::RmsNorm(x.ToDouble(), weight.ToDouble(), kEps);
      const Vector want = reference::MatMul(normed, b.ToDouble(), rows, 2 * n, k, false, true);
      DeviceTensor dx(*ops, x, DType::kF32), dw(*ops, weight, f), db(*ops, b, f), dn(*ops, x, f);
      DeviceTensor product(*ops, out, f), act(*ops, GuardedTensor({rows, n}), f);
      const ops::RmsNormParams norm = {
          .x = dx.view(), .weight = View1D(dw.view().data, f, k), .eps = kEps, .out = dn.view()};
      absl::Status status = ops->NormMatMul({.norm = norm, .b = db.view(), .c = product.view()});
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_LT(RelativeError(product, want), ChainTolerance());
      status = ops->NormSwiGlu(
          {.norm = norm, .b = db.view(), .gate_up = product.view(), .out = act.view()});
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_LT(RelativeError(act, reference::SwiGlu(want, rows, n)), backward_tolerance());
    }
  }
}

// Products that read what the one before wrote, and logits: rows in the compute type and out in
// f32.
std::vector<float> RunChain(ops::Ops& ops, DeviceTensor& a, DeviceTensor& b, TensorView w,
                            TensorView head, DeviceTensor& logits) {
  for (int layer = 0; layer < Scaled(8, 2); ++layer) {
    ops::MatMulParams p = {.a = a.view(), .b = w, .trans_b = true, .c = b.view()};
    p.b_is_parameter = true;
    EXPECT_TRUE(ops.MatMul(p).ok());
    std::swap(p.a, p.c);
    p.addend = p.c;
    EXPECT_TRUE(ops.MatMul(p).ok());
  }
  const ops::MatMulParams p = {
      .a = a.view(), .b = head, .trans_b = true, .c = logits.view(), .b_is_parameter = true};
  EXPECT_TRUE(ops.MatMul(p).ok());
  return logits.Download();
}

TEST_P(NormMatMulTest, ChainsOfProductsGiveEqualBitsAndLogitsInF32) {
  const auto ops = std::move(CreateTestOps(GetParam(), 2)).value();
  const DType f = ops->Info().compute_dtype;
  const int64_t k = 512, n = Scaled(3000, 300);
  GuardedTensor square({k, k}), head({n, k});
  square.FillNormal(random_, 1 / std::sqrt(static_cast<float>(k)));
  head.FillNormal(random_);
  DeviceTensor w(*ops, square, f), weights(*ops, head, f);
  for (const int64_t rows : Share(Scaled<Counts>({8, 16, 32, 64}, {8, 64}))) {
    SCOPED_TRACE(testing::Message() << rows << " rows");
    GuardedTensor x({rows, k}), zeros({rows, n});
    x.FillNormal(random_);
    std::vector<float> first;
    for (int run = 0; run < (on_cuda() ? Repeats(20) : 2); ++run) {
      DeviceTensor a(*ops, x, f), b(*ops, x, f), logits(*ops, zeros, DType::kF32);
      const std::vector<float> got = RunChain(*ops, a, b, w.view(), weights.view(), logits);
      if (run > 0) {
        ASSERT_EQ(got, first) << "run " << run;
        continue;
      }
      first = got;
      const std::vector<float> hidden = a.Download();
      const Vector want = reference::MatMul(Vector(hidden.begin(), hidden.end()), head.ToDouble(),
                                            rows, n, k, false, true);
      EXPECT_LT(RelativeError(logits, want), forward_tolerance());
    }
  }
}

}  // namespace
}  // namespace coppice
