// Every op that works row by row, forward and backward, against the double reference and its finite
// differences.
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <random>

#include "kernels/ops/ops.h"
#include "tests/support/device_test.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/random_batch.h"
#include "tests/support/reference.h"
#include "tests/support/share.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

using reference::Vector;

using Counts = std::vector<int64_t>;

class RowOpsTest : public DeviceTest {
 protected:
  RowOpsTest() : random_(42) {}

  void ExpectGradient(const std::function<double(const Vector&)>& loss, const Vector& x,
                      const GuardedTensor& got, const Vector& before, const char* name) {
    Vector want = reference::NumericGradient(loss, x, tolerance::kFiniteDifferenceStep);
    for (size_t i = 0; i < before.size(); ++i) want[i] += before[i];
    EXPECT_LT(RelativeError(got, want), backward_tolerance()) << name;
    got.ExpectGuardsIntact(name);
  }

  void ExpectRmsNorm(int64_t rows, int64_t hidden, int64_t gap) {
    GuardedTensor x({rows, hidden}, gap), weight({hidden}), out({rows, hidden}, 2 * gap);
    GuardedTensor rstd({rows});
    x.FillNormal(random_);
    weight.FillNormal(random_);
    const Vector want = reference::RmsNorm(x.ToDouble(), weight.ToDouble(), 1e-5f);
    ops::RmsNormParams params = {.x = x.view(),
                                 .weight = weight.view(),
                                 .eps = 1e-5f,
                                 .out = out.view(),
                                 .rstd = rstd.view()};
    ASSERT_TRUE(ops_->RmsNorm(params).ok());
    EXPECT_LT(RelativeError(out, want), forward_tolerance());
    out.ExpectGuardsIntact("out");
    rstd.ExpectGuardsIntact("rstd");
    params.out = x.view();
    params.rstd = {};
    ASSERT_TRUE(ops_->RmsNorm(params).ok());
    EXPECT_EQ(x.ToFloat(), out.ToFloat()) << "in place";
  }

  std::mt19937_64 random_;
};
INSTANTIATE_TEST_SUITE_P(Devices, RowOpsTest, testing::ValuesIn(kDevices));

std::vector<int32_t> RandomIds(std::mt19937_64& random, int64_t n, int32_t limit) {
  std::vector<int32_t> ids(n);
  for (int32_t& id : ids) id = std::uniform_int_distribution<int32_t>(0, limit - 1)(random);
  return ids;
}

TensorView Ints(std::vector<int32_t>& v) {
  return View1D(v.data(), DType::kI32, static_cast<int64_t>(v.size()));
}

TEST_P(RowOpsTest, EmbeddingCopiesRowsAndItsBackwardAddsThem) {
  for (const int64_t rows : {0, 1, 63, 64, 65, 200}) {
    std::vector<int32_t> ids = RandomIds(random_, rows, 7);
    GuardedTensor table({7, 19}, 2), out({rows, 19}, 3), d_table({7, 19}, 1);
    table.FillNormal(random_);
    d_table.FillNormal(random_);
    Vector want = d_table.ToDouble();
    ASSERT_TRUE(ops_->Embedding({Ints(ids), table.view(), out.view()}).ok());
    for (int64_t i = 0; i < rows * 19; ++i) ASSERT_EQ(out[i], table[ids[i / 19] * 19 + i % 19]);
    ASSERT_TRUE(ops_->EmbeddingBackward({Ints(ids), out.view(), d_table.view()}).ok());
    for (int64_t i = 0; i < rows * 19; ++i) want[ids[i / 19] * 19 + i % 19] += out[i];
    EXPECT_LT(RelativeError(d_table, want), forward_tolerance());
    out.ExpectGuardsIntact("out");
    d_table.ExpectGuardsIntact("d_table");
  }
}

TEST_P(RowOpsTest, GatherAndScatterAreTransposes) {
  std::vector<int32_t> indices = {5, 0, 3, 8};
  for (const int64_t hidden : {33, 40, 64}) {
    GuardedTensor src({9, hidden}, 1), out({4, hidden}, 2), dst({9, hidden}, 4);
    src.FillNormal(random_);
    dst.FillNormal(random_);
    Vector want = dst.ToDouble();
    ForComputeAndResidualType([&] {
      out.Fill(0);
      ASSERT_TRUE(ops_->GatherRows({src.view(), Ints(indices), out.view()}).ok());
      for (int64_t i = 0; i < 4 * hidden; ++i) {
        ASSERT_EQ(out[i], src[indices[i / hidden] * hidden + i % hidden]);
      }
    });
    for (int64_t i = 0; i < 4 * hidden; ++i)
      want[indices[i / hidden] * hidden + i % hidden] += out[i];
    ASSERT_TRUE(ops_->ScatterAddRows({out.view(), Ints(indices), dst.view()}).ok());
    EXPECT_LT(RelativeError(dst, want), forward_tolerance());
    dst.ExpectGuardsIntact("dst");
  }
}

TEST_P(RowOpsTest, IndicesOutOfRangeAreRefused) {
  if (on_cuda()) return;  // indices are on the device: rows of NaN, not an error
  for (const int32_t bad : {-1, 7}) {
    std::vector<int32_t> ids = {0, bad};
    GuardedTensor table({7, 4}), out({2, 4});
    const absl::Status status = ops_->Embedding({Ints(ids), table.view(), out.view()});
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ops_->GatherRows({table.view(), Ints(ids), out.view()}).code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ops_->EmbeddingBackward({Ints(ids), out.view(), table.view()}).code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(ops_->ScatterAddRows({out.view(), Ints(ids), table.view()}).code(),
              absl::StatusCode::kInvalidArgument);
  }
}

TEST_P(RowOpsTest, RmsNormMatchesReference) {
  for (const int64_t rows : Share(Scaled<Counts>({0, 1, 31, 32, 33, 65}, {0, 33}))) {
    for (const int64_t hidden :
         Scaled<Counts>({1, 7, 16, 17, 64, 576, 5000, 9000}, {1, 17, 64, 5000, 9000})) {
      for (const int64_t gap : {3, 8}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << hidden << " gap " << gap);
        ForComputeAndResidualType([&] { ExpectRmsNorm(rows, hidden, gap); });
      }
    }
  }
}

TEST_P(RowOpsTest, RmsNormBackwardMatchesFiniteDifferences) {
  struct Shape {
    int64_t rows, hidden, gap;
  };
  // The last two as backends with wide loads like them, of one and of two loads a thread.
  for (const auto& [rows, hidden, gap] :
       {Shape{1, 37, 1}, {33, 5, 1}, {70, 5, 1}, {5, 64, 8}, {1, 4104, 8}}) {
    for (const bool accumulate : {false, true}) {
      SCOPED_TRACE(testing::Message() << rows << " x " << hidden << (accumulate ? " +=" : ""));
      GuardedTensor x({rows, hidden}, gap), weight({hidden}), out({rows, hidden}), rstd({rows});
      GuardedTensor d_out({rows, hidden}, 2 * gap), d_x({rows, hidden}, 3 * gap);
      GuardedTensor d_weight({hidden}), again({rows, hidden}, gap);
      for (GuardedTensor* t : {&x, &weight, &d_out, &d_x, &d_weight}) t->FillNormal(random_);
      const Vector d_weight_before = d_weight.ToDouble();
      const Vector d_x_before = accumulate ? d_x.ToDouble() : Vector();
      ASSERT_TRUE(ops_->RmsNorm({x.view(), weight.view(), 1e-5f, out.view(), rstd.view()}).ok());
      ASSERT_TRUE(ops_->RmsNormBackward({d_out.view(), x.view(), weight.view(), rstd.view(),
                                         d_x.view(), accumulate, d_weight.view(),
                                         accumulate ? again.view() : TensorView{}})
                      .ok());
      if (accumulate) {
        EXPECT_EQ(again.ToFloat(), out.ToFloat());
      }
      again.ExpectGuardsIntact("out");
      const Vector xs = x.ToDouble(), ws = weight.ToDouble(), ds = d_out.ToDouble();
      ExpectGradient(
          [&](const Vector& v) { return reference::Dot(reference::RmsNorm(v, ws, 1e-5f), ds); }, xs,
          d_x, d_x_before, "d_x");
      ExpectGradient(
          [&](const Vector& v) { return reference::Dot(reference::RmsNorm(xs, v, 1e-5f), ds); }, ws,
          d_weight, d_weight_before, "d_weight");
    }
  }
}

TEST_P(RowOpsTest, SwiGluMatchesReferenceAndFiniteDifferences) {
  for (const int64_t rows : {0, 1, 7, 8, 9, 20}) {
    const int64_t ffn = 2 * rows + 1;
    GuardedTensor gate_up({rows, 2 * ffn}, 3), out({rows, ffn}, 1);
    GuardedTensor d_out({rows, ffn}, 2), d_gate_up({rows, 2 * ffn}, 4);
    gate_up.FillNormal(random_, 3);
    d_out.FillNormal(random_);
    ASSERT_TRUE(ops_->SwiGlu({gate_up.view(), out.view()}).ok());
    EXPECT_LT(RelativeError(out, reference::SwiGlu(gate_up.ToDouble(), rows, ffn)),
              forward_tolerance());
    ASSERT_TRUE(ops_->SwiGluBackward({gate_up.view(), d_out.view(), d_gate_up.view()}).ok());
    const Vector ds = d_out.ToDouble();
    ExpectGradient(
        [&](const Vector& v) { return reference::Dot(reference::SwiGlu(v, rows, ffn), ds); },
        gate_up.ToDouble(), d_gate_up, {}, "d_gate_up");
    out.ExpectGuardsIntact("out");
    ASSERT_TRUE(ops_->SwiGluBackward({gate_up.view(), d_out.view(), gate_up.view()}).ok());
    EXPECT_EQ(gate_up.ToFloat(), d_gate_up.ToFloat()) << "in place";
    gate_up.FillNormal(random_, 3);
    ASSERT_TRUE(ops_->SwiGlu({gate_up.view(), out.view()}).ok());
    ASSERT_TRUE(
        ops_->SwiGluBackward({gate_up.view(), d_out.view(), gate_up.view(), d_out.view()}).ok());
    EXPECT_EQ(d_out.ToFloat(), out.ToFloat()) << "the forward's output again, in place";
  }
}

TEST_P(RowOpsTest, SwiGluSaturatesWithoutNan) {
  GuardedTensor gate_up({1, 8}), out({1, 4});
  const float gates[] = {-200.0f, -90.0f, 90.0f, 200.0f};
  for (int i = 0; i < 4; ++i) {
    gate_up[i] = gates[i];
    gate_up[4 + i] = 1;
  }
  ASSERT_TRUE(ops_->SwiGlu({gate_up.view(), out.view()}).ok());
  EXPECT_NEAR(out[0], 0, forward_tolerance());
  EXPECT_NEAR(out[1], 0, forward_tolerance());
  EXPECT_EQ(out[2], 90);
  EXPECT_EQ(out[3], 200);
}

// Gaps between rows are multiples of `gap`.
struct RopeProblem {
  RopeProblem(ops::Ops& ops, std::mt19937_64& random, int64_t head_dim, bool norms, int64_t gap,
              const RandomBatchOptions& options)
      : batch(RandomBatch(random, options)),
        dim(head_dim),
        rope({400, head_dim}, 0),
        q({batch.num_rows(), 4, dim}, 3 * gap),
        k({batch.num_rows(), 2, dim}, gap),
        v({batch.num_rows(), 2, dim}, 5 * gap),
        q_norm({dim}),
        k_norm({dim}),
        with_norms(norms) {
    for (int64_t i = 0; i < 400; ++i) {
      for (int64_t j = 0; j < dim / 2; ++j) {
        const double angle =
            static_cast<double>(i) *
            std::pow(100.0, -2.0 * static_cast<double>(j) / static_cast<double>(dim));
        rope[i * dim + j] = static_cast<float>(std::cos(angle));
        rope[i * dim + dim / 2 + j] = static_cast<float>(std::sin(angle));
      }
    }
    for (GuardedTensor* t : {&q, &k, &v, &q_norm, &k_norm}) t->FillNormal(random);
    for (int64_t i = 0; i < batch.num_rows(); ++i) {
      batch.kv_slots.push_back(i % 3 == 0 ? -1 : static_cast<int32_t>(2 * i));
    }
    plan = std::move(ops.PlanBatch(batch)).value();
  }
  Vector Reference(const Vector& x, const Vector& norm, int64_t heads) const {
    const Vector normed = with_norms ? reference::RmsNorm(x, norm, 1e-5f) : x;
    return reference::Rope(normed, rope.ToDouble(), batch.positions, heads, dim);
  }

  ops::TokenBatch batch;
  int64_t dim;
  GuardedTensor rope, q, k, v, q_norm, k_norm;
  bool with_norms;
  std::unique_ptr<ops::BatchPlan> plan;
};

// Head dims, and gaps that a 16-byte access can step over or not.
std::vector<std::pair<int64_t, int64_t>> RopeShapes() {
  return Share<std::pair<int64_t, int64_t>>(
      {{2, 1}, {6, 1}, {34, 1}, {64, 1}, {64, 8}, {128, 8}, {256, 8}});
}

TEST_P(RowOpsTest, QkNormRopeMatchesReferenceAndStoresKeysAndValues) {
  for (const auto& [dim, gap] : RopeShapes()) {
    for (const bool norms : {false, true}) {
      SCOPED_TRACE(testing::Message()
                   << "head_dim " << dim << " gap " << gap << " norms " << norms);
      RopeProblem p(*ops_, random_, dim, norms, gap, {.max_node_rows = 30});
      const int64_t rows = p.batch.num_rows();
      GuardedTensor q_out({rows, 4, dim}, 2 * gap), k_out({rows, 2, dim}, 7 * gap);
      GuardedTensor page_k({rows, 4, 2, dim}), page_v({rows, 4, 2, dim});
      ASSERT_TRUE(ops_->QkNormRope({.plan = p.plan.get(),
                                    .q_in = p.q.view(),
                                    .k_in = p.k.view(),
                                    .v = p.v.view(),
                                    .q_norm = norms ? p.q_norm.view() : TensorView{},
                                    .k_norm = norms ? p.k_norm.view() : TensorView{},
                                    .eps = 1e-5f,
                                    .rope = p.rope.view(),
                                    .q_out = q_out.view(),
                                    .k_out = k_out.view(),
                                    .pages = {page_k.view(), page_v.view()}})
                      .ok());
      EXPECT_LT(RelativeError(q_out, p.Reference(p.q.ToDouble(), p.q_norm.ToDouble(), 4)),
                forward_tolerance());
      EXPECT_LT(RelativeError(k_out, p.Reference(p.k.ToDouble(), p.k_norm.ToDouble(), 2)),
                forward_tolerance());
      Vector want_k(page_k.size()), want_v(page_v.size());
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; p.batch.kv_slots[i] >= 0 && j < 2 * dim; ++j) {
          want_k[p.batch.kv_slots[i] * 2 * dim + j] = k_out[i * 2 * dim + j];
          want_v[p.batch.kv_slots[i] * 2 * dim + j] = p.v[i * 2 * dim + j];
        }
      }
      EXPECT_EQ(page_k.ToDouble(), want_k);
      EXPECT_EQ(page_v.ToDouble(), want_v);
      q_out.ExpectGuardsIntact("q_out");
      k_out.ExpectGuardsIntact("k_out");
    }
  }
}

TEST_P(RowOpsTest, QkNormRopeBackwardMatchesFiniteDifferences) {
  for (const auto& [dim, gap] : RopeShapes()) {
    for (const bool norms : {false, true}) {
      SCOPED_TRACE(testing::Message()
                   << "head_dim " << dim << " gap " << gap << " norms " << norms);
      RandomBatchOptions rows_of = {.max_node_rows = 30};
      if (dim >= 64) rows_of = {.max_segments = 1, .max_nodes = 2, .max_node_rows = 2};
      RopeProblem p(*ops_, random_, dim, norms, gap, rows_of);
      const int64_t rows = p.batch.num_rows();
      GuardedTensor d_q({rows, 4, dim}, gap), d_k({rows, 2, dim}, 2 * gap);
      GuardedTensor d_q_in({rows, 4, dim}, 3 * gap), d_k_in({rows, 2, dim}, 4 * gap),
          d_q_norm({dim}), d_k_norm({dim});
      for (GuardedTensor* t : {&d_q, &d_k, &d_q_norm, &d_k_norm}) t->FillNormal(random_);
      const Vector q_norm_before = d_q_norm.ToDouble(), k_norm_before = d_k_norm.ToDouble();
      ops::QkNormRopeBackwardParams params = {.plan = p.plan.get(),
                                              .d_q_out = d_q.view(),
                                              .d_k_out = d_k.view(),
                                              .eps = 1e-5f,
                                              .rope = p.rope.view(),
                                              .d_q_in = d_q_in.view(),
                                              .d_k_in = d_k_in.view()};
      if (norms) {
        params.q_in = p.q.view();
        params.k_in = p.k.view();
        params.q_norm = p.q_norm.view();
        params.k_norm = p.k_norm.view();
        params.d_q_norm = d_q_norm.view();
        params.d_k_norm = d_k_norm.view();
      }
      ASSERT_TRUE(ops_->QkNormRopeBackward(params).ok());
      const auto check = [&](const GuardedTensor& x, const GuardedTensor& norm, int64_t heads,
                             const GuardedTensor& d_out, const GuardedTensor& d_in,
                             const GuardedTensor& d_norm, const Vector& before) {
        const Vector xs = x.ToDouble(), ns = norm.ToDouble(), ds = d_out.ToDouble();
        ExpectGradient(
            [&](const Vector& t) { return reference::Dot(p.Reference(t, ns, heads), ds); }, xs,
            d_in, {}, "d_in");
        if (!norms) return;
        ExpectGradient(
            [&](const Vector& t) { return reference::Dot(p.Reference(xs, t, heads), ds); }, ns,
            d_norm, before, "d_norm");
      };
      if (rows * dim <= Scaled(1500, 300)) {  // the differences cost its square
        check(p.q, p.q_norm, 4, d_q, d_q_in, d_q_norm, q_norm_before);
        check(p.k, p.k_norm, 2, d_k, d_k_in, d_k_norm, k_norm_before);
      }
      const std::vector<float> apart = d_q_in.ToFloat();
      params.d_q_in = d_q.view();
      params.d_k_in = d_k.view();
      ASSERT_TRUE(ops_->QkNormRopeBackward(params).ok());
      EXPECT_EQ(d_q.ToFloat(), apart) << "in place";
    }
  }
}

TEST_P(RowOpsTest, SumRowsAddsInTheSameOrderForEveryNumberOfThreads) {
  for (const int64_t rows : {0, 1, 32, 33, 500}) {
    GuardedTensor x({rows, 300}, 1);
    x.FillNormal(random_);
    Vector want(300, 1.0);
    for (int64_t i = 0; i < rows * 300; ++i) want[i % 300] += x[i];
    std::vector<float> first;
    for (const int threads : {1, 2, 3}) {
      const auto ops = std::move(ops::CreateOps("cpu", threads)).value();
      GuardedTensor out({300});
      out.Fill(1);
      ASSERT_TRUE(ops->SumRows({x.view(), out.view()}).ok());
      EXPECT_LT(RelativeError(out, want), forward_tolerance());
      if (threads == 1) first = out.ToFloat();
      EXPECT_EQ(out.ToFloat(), first);
      out.ExpectGuardsIntact("out");
    }
  }
}

TEST_P(RowOpsTest, CopyConvertsAndKeepsStrides) {
  GuardedTensor src({5, 9}, 3), back({5, 9}, 2);
  src.FillNormal(random_);
  src[0] = 1.0f + 1.0f / 4096;  // needs rounding in both 16-bit types
  src[1] = 70000.0f;            // infinite in f16
  src[2] = 3e-7f;               // a denormal in f16
  ASSERT_TRUE(ops_->Copy(src.view(), back.view()).ok());
  EXPECT_EQ(src.ToFloat(), back.ToFloat());
  back.ExpectGuardsIntact("dst");
  struct Format {
    DType dtype;
    double relative, smallest;
  };
  for (const Format& f :
       {Format{DType::kBF16, 1.0 / 256, 0}, Format{DType::kF16, 1.0 / 2048, 0x1p-25}}) {
    std::vector<uint16_t> half(45);
    const TensorView narrow = View2D(half.data(), f.dtype, 5, 9);
    ASSERT_TRUE(ops_->Copy(src.view(), narrow).ok());
    ASSERT_TRUE(ops_->Copy(narrow, back.view()).ok());
    for (int64_t i = 0; i < 45; ++i) {
      if (i == 1 && f.dtype == DType::kF16) {
        EXPECT_EQ(back[i], INFINITY);
      } else {
        EXPECT_NEAR(back[i], src[i], std::max(f.smallest, std::abs(src[i]) * f.relative)) << i;
      }
    }
  }
}

TEST_P(RowOpsTest, CopyRepeatsARowOfStrideZero) {
  GuardedTensor src({1, 9}), dst({4, 9}, 2);
  src.FillNormal(random_);
  TensorView repeated = src.view();
  repeated.shape[0] = 4;
  repeated.stride[0] = 0;
  ASSERT_TRUE(ops_->Copy(repeated, dst.view()).ok());
  for (int64_t i = 0; i < 36; ++i) ASSERT_EQ(dst[i], src[i % 9]);
  dst.ExpectGuardsIntact("dst");
}

TEST_P(RowOpsTest, EveryF16ValueSurvivesTheRoundTrip) {
  std::vector<uint16_t> bits(1 << 16), back(1 << 16);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(1 << 16);
  const auto view = [](auto& v, DType t) { return View1D(v.data(), t, 1 << 16); };
  for (const DType t : {DType::kF16, DType::kBF16}) {
    ASSERT_TRUE(ops_->Copy(view(bits, t), view(wide, DType::kF32)).ok());
    ASSERT_TRUE(ops_->Copy(view(wide, DType::kF32), view(back, t)).ok());
    for (size_t i = 0; i < bits.size(); ++i) {
      ASSERT_TRUE(std::isnan(wide[i]) || bits[i] == back[i]) << Name(t) << " " << i;
    }
  }
}

TEST_P(RowOpsTest, CopyBlocksCopiesAllLayers) {
  GuardedTensor pool({6, 5, 2, 3});
  pool.FillNormal(random_);
  const std::vector<float> before = pool.ToFloat();
  const int32_t src[] = {0, 4}, dst[] = {3, 1};
  ASSERT_TRUE(ops_->CopyBlocks({pool.view(), src, dst, 2}).ok());
  const int32_t source_of[] = {0, 4, 2, 0, 4};
  for (int64_t i = 0; i < pool.size(); ++i) {
    const int64_t plane = i / 30, block = i / 6 % 5;
    ASSERT_EQ(pool[i], before[plane * 30 + source_of[block] * 6 + i % 6]);
  }
  pool.ExpectGuardsIntact("pool");
  const int32_t bad[] = {5};
  EXPECT_EQ(ops_->CopyBlocks({pool.view(), bad, dst, 1}).code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_P(RowOpsTest, BuffersAreZeroAlignedAndMoveData) {
  auto buffer = ops_->Allocate(100, "test");
  ASSERT_TRUE(buffer.ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
  const TensorView view = View1D(buffer->data(), DType::kF32, 25);
  std::vector<float> host(25, 7), got(25, 1);
  ASSERT_TRUE(ops_->Download(view, got.data()).ok());
  EXPECT_EQ(got, std::vector<float>(25));
  ASSERT_TRUE(ops_->Upload(host.data(), view).ok());
  ASSERT_TRUE(ops_->Download(view, got.data()).ok());
  EXPECT_EQ(got, host);
  ASSERT_TRUE(ops_->Zero(view).ok());
  ASSERT_TRUE(ops_->Download(view, got.data()).ok());
  EXPECT_EQ(got, std::vector<float>(25));
  EXPECT_EQ(ops_->Allocate(int64_t{1} << 60, "too much").status().code(),
            absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace coppice
