// The second half of a layer with the next layer's projections behind it: on a backend of its own
// kind one kernel, where rows are few.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#include "kernels/ops/ops.h"
#include "tests/support/device_test.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/reference.h"
#include "tests/support/share.h"

namespace coppice {
namespace {

using reference::Vector;

using Counts = std::vector<int64_t>;

constexpr float kEps = 1e-5f;

struct Shape {
  int64_t rows, hidden, q_dim, ffn, qkv_dim;
};
// Rows around every size a backend rounds up to; widths below and above its tiles, with ragged
// ends. Few for each multiprocessor: see ManySharesABlockMatchReference.
std::vector<Shape> Shapes() {
  std::vector<Shape> shapes;
  for (const int64_t rows : {1, 7, 8, 9, 16, 17, 32, 33, 64, 65}) {
    shapes.push_back({rows, 64, 64, 8, 64});
    shapes.push_back({rows, 136, 200, 72, 328});
  }
  shapes.push_back({5, 320, 1096, 1000, 776});
  shapes.push_back({40, 448, 320, 1352, 264});
  return Share(Scaled(shapes, {{1, 136, 200, 72, 328},
                               {8, 64, 64, 8, 64},
                               {9, 136, 200, 72, 328},
                               {17, 136, 200, 72, 328},
                               {32, 64, 64, 8, 64},
                               {33, 136, 200, 72, 328},
                               {65, 64, 64, 8, 64},
                               {5, 320, 1096, 1000, 776}}));
}

// One layer's tensors, filled at random.
struct Block {
  Block(const Shape& s, std::mt19937_64& random)
      : attn_out({s.rows, s.q_dim}, 8),
        o({s.hidden, s.q_dim}, 16),
        stream({s.rows, s.hidden}, 2),
        output({s.rows, s.hidden}, 4),
        mlp_norm({s.hidden}),
        next_norm({s.hidden}),
        normed({s.rows, s.hidden}, 8),
        gate_up_weight({2 * s.ffn, s.hidden}),
        gate_up({s.rows, 2 * s.ffn}),
        act({s.rows, s.ffn}, 8),
        down({s.hidden, s.ffn}, 8),
        qkv_weight({s.qkv_dim, s.hidden}, 8),
        bias({s.qkv_dim}),
        qkv({s.rows, s.qkv_dim}, 8) {
    for (GuardedTensor* t : {&attn_out, &stream, &mlp_norm, &next_norm, &bias})
      t->FillNormal(random);
    o.FillNormal(random, 1 / std::sqrt(static_cast<float>(s.q_dim)));
    down.FillNormal(random, 1 / std::sqrt(static_cast<float>(s.ffn)));
    for (GuardedTensor* t : {&gate_up_weight, &qkv_weight})
      t->FillNormal(random, 1 / std::sqrt(static_cast<float>(s.hidden)));
  }
  // Over one residual stream, or with an output of its own.
  ops::MlpBlockParams Params(bool in_place, bool with_next, bool with_bias) const {
    const TensorView out = in_place ? stream.view() : output.view();
    ops::MlpBlockParams p = {.attn_out = attn_out.view(),
                             .o = o.view(),
                             .input = stream.view(),
                             .mlp = {.norm = {.x = stream.view(),
                                              .weight = mlp_norm.view(),
                                              .eps = kEps,
                                              .out = normed.view()},
                                     .b = gate_up_weight.view(),
                                     .gate_up = gate_up.view(),
                                     .out = act.view()},
                             .down = down.view(),
                             .output = out};
    if (with_next)
      p.next = {.norm = {.x = out, .weight = next_norm.view(), .eps = kEps, .out = normed.view()},
                .b = qkv_weight.view(),
                .bias = with_bias ? bias.view() : TensorView{},
                .c = qkv.view()};
    return p;
  }

  GuardedTensor attn_out, o, stream, output, mlp_norm, next_norm, normed, gate_up_weight, gate_up,
      act, down, qkv_weight, bias, qkv;
};

struct Want {
  Vector output, qkv;
};
Want Reference(const Shape& s, const Block& b, bool with_bias) {
  Want want;
  Vector mid = reference::MatMul(b.attn_out.ToDouble(), b.o.ToDouble(), s.rows, s.hidden, s.q_dim,
                                 false, true);
  const Vector input = b.stream.ToDouble();
  for (size_t i = 0; i < mid.size(); ++i) mid[i] += input[i];
  const Vector normed = reference::RmsNorm(mid, b.mlp_norm.ToDouble(), kEps);
  const Vector act = reference::SwiGlu(reference::MatMul(normed, b.gate_up_weight.ToDouble(),
                                                         s.rows, 2 * s.ffn, s.hidden, false, true),
                                       s.rows, s.ffn);
  want.output = reference::MatMul(act, b.down.ToDouble(), s.rows, s.hidden, s.ffn, false, true);
  for (size_t i = 0; i < mid.size(); ++i) want.output[i] += mid[i];
  want.qkv = reference::MatMul(reference::RmsNorm(want.output, b.next_norm.ToDouble(), kEps),
                               b.qkv_weight.ToDouble(), s.rows, s.qkv_dim, s.hidden, false, true);
  for (size_t i = 0; i < want.qkv.size() && with_bias; ++i) want.qkv[i] += b.bias[i % s.qkv_dim];
  return want;
}

class MlpBlockTest : public DeviceTest {
 protected:
  std::mt19937_64 random_{23};
};
INSTANTIATE_TEST_SUITE_P(Devices, MlpBlockTest, testing::ValuesIn(kDevices));

TEST_P(MlpBlockTest, MatchesReference) {
  for (const Shape& s : Shapes()) {
    for (const int variant : {0, 1, 2, 3}) {
      const bool in_place = variant % 2 == 0, with_next = variant != 1, with_bias = variant == 2;
      SCOPED_TRACE(testing::Message() << s.rows << " x " << s.hidden << " variant " << variant);
      Block block(s, random_);
      const Want want = Reference(s, block, with_bias);
      const absl::Status status = ops_->MlpBlock(block.Params(in_place, with_next, with_bias));
      ASSERT_TRUE(status.ok()) << status;
      const GuardedTensor& output = in_place ? block.stream : block.output;
      EXPECT_LT(RelativeError(output, want.output), backward_tolerance());
      output.ExpectGuardsIntact("output");
      if (!with_next) continue;
      EXPECT_LT(RelativeError(block.qkv, want.qkv), backward_tolerance());
      block.qkv.ExpectGuardsIntact("qkv");
    }
  }
}

// Rows and norms so large that a 16-bit type may hold the normed rows, but not x * norm.
TEST_P(MlpBlockTest, LargeRowsAreNormed) {
  for (const int64_t rows : Share(Scaled<Counts>({1, 8, 16, 32, 64}, {1, 64}))) {
    SCOPED_TRACE(testing::Message() << rows << " rows");
    const Shape shape = {rows, 136, 200, 72, 328};
    Block block(shape, random_);
    block.stream.FillNormal(random_, 0x1p13f);
    for (GuardedTensor* norm : {&block.mlp_norm, &block.next_norm}) norm->FillNormal(random_, 4);
    const Want want = Reference(shape, block, true);
    const absl::Status status = ops_->MlpBlock(block.Params(true, true, true));
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_LT(RelativeError(block.stream, want.output), backward_tolerance());
    EXPECT_LT(RelativeError(block.qkv, want.qkv), backward_tolerance());
  }
}

// Heads of the last projections: norm, RoPE, and keys and values in their pages, in place.
struct Heads {
  Heads(ops::Ops& ops, const Block& block, int64_t rows, int64_t q_count, int64_t kv_count,
        int64_t head_dim, std::mt19937_64& random)
      : q_heads(q_count),
        kv_heads(kv_count),
        dim(head_dim),
        rope({rows + 1, dim}),
        q_norm({dim}),
        k_norm({dim}),
        page_k({rows, 2, kv_heads, dim}),
        page_v({rows, 2, kv_heads, dim}) {
    for (GuardedTensor* t : {&rope, &q_norm, &k_norm}) t->FillNormal(random);
    batch.block_tokens = 2;
    for (int32_t row = 0; row < rows; ++row) {
      batch.tokens.push_back(0);
      batch.positions.push_back(row);
      batch.subtree_end.push_back(static_cast<int32_t>(rows));
      batch.kv_slots.push_back(row % 3 == 2 ? -1 : 2 * row + 1);
    }
    batch.segments = {{.row_begin = 0, .row_end = static_cast<int32_t>(rows)}};
    plan = std::move(ops.PlanBatch(batch)).value();
    const TensorView qkv = block.qkv.view();
    q = qkv.Cols(0, q_heads * dim).SplitHeads(q_heads, dim);
    k = qkv.Cols(q_heads * dim, (q_heads + kv_heads) * dim).SplitHeads(kv_heads, dim);
    v = qkv.Cols((q_heads + kv_heads) * dim, qkv.dim(1)).SplitHeads(kv_heads, dim);
  }
  ops::QkNormRopeParams Params(bool norms, bool stores) const {
    return {.plan = plan.get(),
            .q_in = q,
            .k_in = k,
            .v = v,
            .q_norm = norms ? q_norm.view() : TensorView{},
            .k_norm = norms ? k_norm.view() : TensorView{},
            .eps = kEps,
            .rope = rope.view(),
            .q_out = q,
            .k_out = k,
            .pages = stores ? ops::PagedKv{page_k.view(), page_v.view()} : ops::PagedKv{}};
  }
  // Projections [rows, q_heads + 2 kv_heads, dim] as they come out.
  Vector Reference(const Vector& qkv, bool norms) const {
    const int64_t row_size = (q_heads + 2 * kv_heads) * dim;
    Vector want = qkv;
    for (int64_t at = 0; at < static_cast<int64_t>(qkv.size()); at += dim) {
      const int64_t row = at / row_size, head = at % row_size / dim;
      if (head >= q_heads + kv_heads) continue;
      Vector x(qkv.begin() + at, qkv.begin() + at + dim);
      const GuardedTensor& norm = head < q_heads ? q_norm : k_norm;
      if (norms) x = reference::RmsNorm(x, norm.ToDouble(), kEps);
      x = reference::Rope(x, rope.ToDouble(), {batch.positions[row]}, 1, dim);
      std::copy(x.begin(), x.end(), want.begin() + at);
    }
    return want;
  }
  void ExpectPages(const Block& block, bool stores) const {
    const int64_t kv_size = kv_heads * dim, row_size = (q_heads + 2 * kv_heads) * dim;
    Vector want_k(page_k.size()), want_v(page_v.size());
    for (int64_t row = 0; row < batch.num_rows(); ++row) {
      for (int64_t i = 0; stores && batch.kv_slots[row] >= 0 && i < kv_size; ++i) {
        const int64_t to = batch.kv_slots[row] * kv_size + i;
        want_k[to] = block.qkv[row * row_size + q_heads * dim + i];
        want_v[to] = block.qkv[row * row_size + q_heads * dim + kv_size + i];
      }
    }
    EXPECT_EQ(page_k.ToDouble(), want_k);
    EXPECT_EQ(page_v.ToDouble(), want_v);
  }

  int64_t q_heads, kv_heads, dim;
  ops::TokenBatch batch;
  GuardedTensor rope, q_norm, k_norm, page_k, page_v;
  std::unique_ptr<ops::BatchPlan> plan;
  TensorView q, k, v;
};

TEST_P(MlpBlockTest, RotatesHeadsAndStoresKeysAndValues) {
  for (const int64_t rows : Share(Scaled<Counts>({1, 8, 9, 31, 64, 65}, {8, 9, 31, 64, 65}))) {
    for (const auto& [q_heads, kv_heads, dim] : Scaled<std::vector<std::tuple<int, int, int>>>(
             {{3, 2, 64}, {4, 2, 128}, {3, 1, 128}, {5, 5, 64}, {2, 2, 32}},
             {{3, 2, 64}, {3, 1, 128}, {2, 2, 32}})) {
      for (const auto& [norms, stores] : {std::pair{false, true}, {true, true}, {true, false}}) {
        SCOPED_TRACE(testing::Message() << rows << " rows, " << q_heads << "/" << kv_heads << " x "
                                        << dim << " norms " << norms << " stores " << stores);
        const Shape shape = {rows, 192, 128, 136, (q_heads + 2 * kv_heads) * dim};
        Block block(shape, random_);
        const Heads heads(*ops_, block, rows, q_heads, kv_heads, dim, random_);
        const Vector want = heads.Reference(Reference(shape, block, true).qkv, norms);
        ops::MlpBlockParams p = block.Params(true, true, true);
        p.rotate = heads.Params(norms, stores);
        const absl::Status status = ops_->MlpBlock(p);
        ASSERT_TRUE(status.ok()) << status;
        EXPECT_LT(RelativeError(block.qkv, want), backward_tolerance());
        block.qkv.ExpectGuardsIntact("qkv");
        heads.ExpectPages(block, stores);
      }
    }
  }
}

// On 132 multiprocessors a block has 23 to 30 shares of 128 x 64 weights, 15 to 19 with the wider
// MLP: rings of 6 to 13 wrap. Runs end one tile and begin the next in every phase; with the wider
// MLP they hold whole tiles, and finish two.
TEST_P(MlpBlockTest, ManySharesABlockMatchReference) {
  constexpr int64_t kQkv = (32 + 2 * 8) * 128;
  for (const Shape& shape : Share<Shape>({{5, 1536, 1632, 4096, kQkv},
                                          {12, 512, 1536, 9728, kQkv},
                                          {24, 512, 1536, 9728, kQkv},
                                          {33, 1536, 1632, 4096, kQkv}})) {
    SCOPED_TRACE(testing::Message() << shape.rows << " rows");
    Block block(shape, random_);
    const Heads heads(*ops_, block, shape.rows, 32, 8, 128, random_);
    const Want want = Reference(shape, block, true);
    const std::vector<float> input = block.stream.ToFloat();
    for (const bool rotates : {false, true}) {
      for (size_t i = 0; i < input.size(); ++i) block.stream[static_cast<int64_t>(i)] = input[i];
      ops::MlpBlockParams p = block.Params(/*in_place=*/rotates, true, true);
      if (rotates) p.rotate = heads.Params(true, true);
      const absl::Status status = ops_->MlpBlock(p);
      ASSERT_TRUE(status.ok()) << status;
      const GuardedTensor& output = rotates ? block.stream : block.output;
      EXPECT_LT(RelativeError(output, want.output), backward_tolerance());
      const Vector qkv = rotates ? heads.Reference(want.qkv, true) : want.qkv;
      EXPECT_LT(RelativeError(block.qkv, qkv), backward_tolerance());
    }
    block.qkv.ExpectGuardsIntact("qkv");
    heads.ExpectPages(block, true);
  }
}

TEST_P(MlpBlockTest, EqualInputsGiveEqualBits) {
  for (const int64_t rows : Share(Scaled<Counts>({2, 12, 24, 64}, {2, 12, 24}))) {
    SCOPED_TRACE(testing::Message() << rows << " rows");
    const Shape shape = {rows, 256, 384, 640, 512};
    Block block(shape, random_);
    const std::vector<float> input = block.stream.ToFloat();
    std::vector<float> first;
    for (int run = 0; run < (on_cuda() ? Repeats(20) : 2); ++run) {
      for (size_t i = 0; i < input.size(); ++i) block.stream[static_cast<int64_t>(i)] = input[i];
      const absl::Status status = ops_->MlpBlock(block.Params(true, true, true));
      ASSERT_TRUE(status.ok()) << status;
      std::vector<float> got = block.stream.ToFloat();
      const std::vector<float> qkv = block.qkv.ToFloat();
      got.insert(got.end(), qkv.begin(), qkv.end());
      if (run == 0) first = got;
      ASSERT_EQ(got, first) << "run " << run;
    }
  }
}

TEST_P(MlpBlockTest, ShapesThatDoNotMatchAreRefused) {
  const Shape shape = {4, 64, 64, 64, 64};
  Block block(shape, random_);
  GuardedTensor narrow({64, 56}), few({3, 64});
  ops::MlpBlockParams p = block.Params(true, true, true);
  p.down = narrow.view();
  EXPECT_EQ(ops_->MlpBlock(p).code(), absl::StatusCode::kInvalidArgument);
  p = block.Params(true, true, true);
  p.o = narrow.view();
  EXPECT_EQ(ops_->MlpBlock(p).code(), absl::StatusCode::kInvalidArgument);
  p = block.Params(true, true, true);
  p.next.c = few.view();
  EXPECT_EQ(ops_->MlpBlock(p).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace coppice
