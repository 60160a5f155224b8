// Tree attention against the double reference, which applies the mask k <= q < subtree_end[k]
// literally.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "kernels/ops/ops.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/random_batch.h"
#include "tests/support/reference.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

using ops::TokenBatch;
using reference::AttentionInputs;
using reference::AttentionShape;

// All tensors of one attention call, random, with gaps between rows.
struct Problem {
  Problem(TokenBatch b, AttentionShape s, std::mt19937_64& random)
      : batch(std::move(b)),
        shape(s),
        q({batch.num_rows(), s.q_heads, s.head_dim}, 3),
        k({batch.num_rows(), s.kv_heads, s.head_dim}, 5),
        v({batch.num_rows(), s.kv_heads, s.head_dim}, 7),
        out({batch.num_rows(), s.q_heads, s.head_dim}, 2),
        lse({batch.num_rows(), s.q_heads}, 1),
        page_k(PageShape()),
        page_v(PageShape()),
        scale(1 / std::sqrt(static_cast<float>(s.head_dim))) {
    for (GuardedTensor* t : {&q, &k, &v, &page_k, &page_v}) t->FillNormal(random);
  }

  std::vector<int64_t> PageShape() const {
    int32_t blocks = 1;
    for (const int32_t b : batch.context_blocks) blocks = std::max(blocks, b + 1);
    return {blocks, std::max(batch.block_tokens, 1), shape.kv_heads, shape.head_dim};
  }
  ops::PagedKv pages() const { return {page_k.view(), page_v.view()}; }
  AttentionInputs inputs() const {
    return {q.ToDouble(), k.ToDouble(), v.ToDouble(), page_k.ToDouble(), page_v.ToDouble()};
  }
  std::unique_ptr<ops::BatchPlan> Forward(ops::Ops& ops) {
    auto plan = ops.PlanBatch(batch);
    EXPECT_TRUE(plan.ok()) << plan.status();
    const absl::Status status = ops.TreeAttention({.plan = plan->get(),
                                                   .q = q.view(),
                                                   .k = k.view(),
                                                   .v = v.view(),
                                                   .context = pages(),
                                                   .scale = scale,
                                                   .out = out.view(),
                                                   .lse = lse.view()});
    EXPECT_TRUE(status.ok()) << status;
    return std::move(plan).value();
  }

  TokenBatch batch;
  AttentionShape shape;
  GuardedTensor q, k, v, out, lse, page_k, page_v;
  float scale;
};

struct Gradients {
  explicit Gradients(const Problem& p)
      : d_q({p.batch.num_rows(), p.shape.q_heads, p.shape.head_dim}, 1),
        d_k({p.batch.num_rows(), p.shape.kv_heads, p.shape.head_dim}, 4),
        d_v({p.batch.num_rows(), p.shape.kv_heads, p.shape.head_dim}, 6),
        d_page_k(p.PageShape()),
        d_page_v(p.PageShape()) {}

  absl::Status Backward(ops::Ops& ops, const Problem& p, const ops::BatchPlan& plan,
                        const GuardedTensor& d_out, bool with_context) {
    return ops.TreeAttentionBackward(
        {.plan = &plan,
         .q = p.q.view(),
         .k = p.k.view(),
         .v = p.v.view(),
         .context = p.pages(),
         .scale = p.scale,
         .out = p.out.view(),
         .lse = p.lse.view(),
         .d_out = d_out.view(),
         .d_q = d_q.view(),
         .d_k = d_k.view(),
         .d_v = d_v.view(),
         .d_context =
             with_context ? ops::PagedKv{d_page_k.view(), d_page_v.view()} : ops::PagedKv{}});
  }

  GuardedTensor d_q, d_k, d_v, d_page_k, d_page_v;
};

std::unique_ptr<ops::Ops> Cpu(int threads = 2) {
  auto ops = ops::CreateOps("cpu", threads);
  EXPECT_TRUE(ops.ok()) << ops.status();
  return std::move(ops).value();
}

// One chain of `rows` tokens, below `context` cached ones.
TokenBatch Chain(int rows, int context, int32_t block_tokens) {
  TokenBatch b;
  b.block_tokens = block_tokens;
  if (context > 0) {
    b.context_nodes.push_back({.parent = -1, .num_tokens = context, .block_begin = 0});
    const int blocks = (context + block_tokens - 1) / block_tokens;
    for (int i = 0; i < blocks; ++i) b.context_blocks.push_back(blocks - 1 - i);
  }
  for (int i = 0; i < rows; ++i) {
    b.tokens.push_back(1);
    b.positions.push_back(context + i);
    b.subtree_end.push_back(rows);
  }
  if (rows > 0) b.segments.push_back({0, rows, context > 0 ? 0 : -1});
  return b;
}

void ExpectForwardMatches(Problem& p, ops::Ops& ops) {
  p.Forward(ops);
  reference::Vector lse;
  const reference::Vector want =
      reference::TreeAttention(p.batch, p.inputs(), p.shape, p.scale, &lse);
  EXPECT_LT(RelativeError(p.out, want), tolerance::kOpForward);
  EXPECT_LT(RelativeError(p.lse, lse), tolerance::kOpForward);
  p.out.ExpectGuardsIntact("out");
  p.lse.ExpectGuardsIntact("lse");
}

TEST(TreeAttentionTest, ForwardMatchesReferenceOnRandomTrees) {
  const auto ops = Cpu();
  for (uint64_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const AttentionShape shapes[] = {{1, 1, 2}, {4, 2, 16}, {3, 1, 24}, {6, 2, 64}, {2, 2, 6}};
    RandomBatchOptions options;
    options.max_context_nodes = seed % 2 == 0 ? 0 : 5;
    options.max_node_rows = seed % 3 == 0 ? 40 : 5;
    Problem p(RandomBatch(random, options), shapes[seed % 5], random);
    ExpectForwardMatches(p, *ops);
  }
}

TEST(TreeAttentionTest, ForwardMatchesReferenceAroundTileSizes) {
  const auto ops = Cpu();
  std::mt19937_64 random(7);
  for (const int rows : {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200}) {
    for (const int context : {0, 1, 63, 64, 65, 130}) {
      SCOPED_TRACE(testing::Message() << rows << " rows below " << context);
      Problem p(Chain(rows, context, 16), {2, 1, 32}, random);
      ExpectForwardMatches(p, *ops);
    }
  }
}

TEST(TreeAttentionTest, LongContextMatchesReference) {
  const auto ops = Cpu();
  std::mt19937_64 random(8);
  Problem p(Chain(3, 2500, 16), {6, 2, 64}, random);
  ExpectForwardMatches(p, *ops);
}

// What is no number stays with the request or branch that has it, and those below: all others keep
// their bits.
TEST(TreeAttentionTest, OtherRequestsAndBranchesKeepTheirBitsBesideANan) {
  const auto ops = Cpu();
  for (uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    RandomBatchOptions options;
    options.max_context_nodes = seed % 2 == 0 ? 0 : 5;
    options.max_node_rows = seed % 3 == 0 ? 40 : 5;
    Problem p(RandomBatch(random, options), {4, 2, 16}, random);
    p.Forward(*ops);
    const reference::Vector want = p.out.ToDouble();
    const int64_t row = static_cast<int64_t>(random() % p.batch.num_rows());
    const int32_t end = p.batch.subtree_end[row];
    int64_t run = row;
    while (run > 0 && p.batch.subtree_end[run - 1] == end) --run;
    GuardedTensor& spoilt = seed % 3 == 0 ? p.k : p.v;
    spoilt.view().f32()[row * spoilt.view().stride[0] + 5] = seed % 2 == 0 ? NAN : INFINITY;
    p.Forward(*ops);
    const reference::Vector got = p.out.ToDouble();
    const int64_t width = p.shape.q_heads * p.shape.head_dim;
    for (int64_t i = 0; i < p.batch.num_rows() * width; ++i) {
      const bool may_see = i / width >= run && i / width < end;
      ASSERT_TRUE(may_see || got[i] == want[i]) << "row " << i / width << ", spoilt row " << row;
    }
    // A score of -inf is none.
    const bool is_seen = &spoilt == &p.v || seed % 2 == 0;
    const auto at = got.begin() + row * width;
    const auto is_number = [](double x) { return std::isfinite(x); };
    EXPECT_TRUE(!is_seen || !std::all_of(at, at + width, is_number));
  }
}

TEST(TreeAttentionTest, EmptyBatchIsFine) {
  const auto ops = Cpu();
  std::mt19937_64 random(9);
  Problem p(Chain(0, 0, 16), {2, 1, 8}, random);
  p.Forward(*ops);
}

// Rows see what they see, whether it is cached or packed, and whatever else is in the batch: bit
// for bit.
TEST(TreeAttentionTest, SplitBetweenContextAndRowsChangesNoBit) {
  const auto ops = Cpu();
  const AttentionShape shape = {6, 2, 64};
  const int total = 300;
  std::mt19937_64 random(10);
  Problem whole(Chain(total, 0, 16), shape, random);
  whole.Forward(*ops);
  const int64_t kv_width = shape.kv_heads * shape.head_dim,
                q_width = shape.q_heads * shape.head_dim;
  for (int cut = 1; cut < total; cut += 23) {
    Problem p(Chain(total - cut, cut, 16), shape, random);
    for (int64_t row = 0; row < total; ++row) {
      for (int64_t i = 0; i < kv_width; ++i) {
        const float key = whole.k[row * kv_width + i], value = whole.v[row * kv_width + i];
        if (row < cut) {
          const int64_t slot = p.batch.context_blocks[row / 16] * 16 + row % 16;
          p.page_k[slot * kv_width + i] = key;
          p.page_v[slot * kv_width + i] = value;
        } else {
          p.k[(row - cut) * kv_width + i] = key;
          p.v[(row - cut) * kv_width + i] = value;
        }
      }
    }
    for (int64_t i = 0; i < (total - cut) * q_width; ++i) p.q[i] = whole.q[cut * q_width + i];
    p.Forward(*ops);
    for (int64_t i = 0; i < (total - cut) * q_width; ++i) {
      ASSERT_EQ(p.out[i], whole.out[cut * q_width + i]) << "cut " << cut << " element " << i;
    }
  }
}

// A group that decodes below one prompt reads it together; each sample still gets the bits it would
// get alone.
TEST(TreeAttentionTest, SamplesOfAGroupGetTheBitsTheyGetAlone) {
  const auto ops = Cpu();
  const AttentionShape shape = {6, 2, 64};
  std::mt19937_64 random(11);
  TokenBatch group;
  group.block_tokens = 16;
  group.context_nodes.push_back({.parent = -1, .num_tokens = 208, .block_begin = 0});
  for (int i = 0; i < 13; ++i) group.context_blocks.push_back(i);
  for (int s = 0; s < 9; ++s) {
    const int own = 1 + 5 * s;
    group.context_nodes.push_back({.parent = 0,
                                   .num_tokens = own,
                                   .block_begin = static_cast<int>(group.context_blocks.size())});
    for (int i = 0; i < (own + 15) / 16; ++i) {
      group.context_blocks.push_back(static_cast<int>(group.context_blocks.size()));
    }
    group.tokens.push_back(1);
    group.positions.push_back(208 + own);
    group.subtree_end.push_back(s + 1);
    group.segments.push_back({s, s + 1, s + 1});
  }
  Problem p(group, shape, random);
  ExpectForwardMatches(p, *ops);
  const int64_t width = shape.q_heads * shape.head_dim;
  for (int s = 0; s < 9; ++s) {
    TokenBatch alone = group;
    alone.tokens = {1};
    alone.positions = {group.positions[s]};
    alone.subtree_end = {1};
    alone.segments = {{0, 1, s + 1}};
    auto plan = ops->PlanBatch(alone);
    ASSERT_TRUE(plan.ok()) << plan.status();
    GuardedTensor out({1, shape.q_heads, shape.head_dim});
    ASSERT_TRUE(ops->TreeAttention({.plan = plan->get(),
                                    .q = p.q.view().Rows(s, s + 1),
                                    .k = p.k.view().Rows(s, s + 1),
                                    .v = p.v.view().Rows(s, s + 1),
                                    .context = p.pages(),
                                    .scale = p.scale,
                                    .out = out.view()})
                    .ok());
    for (int64_t i = 0; i < width; ++i) ASSERT_EQ(out[i], p.out[s * width + i]) << "sample " << s;
  }
}

TEST(TreeAttentionTest, BackwardMatchesFiniteDifferences) {
  const auto ops = Cpu();
  for (uint64_t seed = 0; seed < 24; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(100 + seed);
    const AttentionShape shapes[] = {{1, 1, 2}, {4, 2, 4}, {3, 1, 6}};
    RandomBatchOptions options;
    options.max_segments = 2;
    options.max_node_rows = 3;
    options.num_blocks = 8;
    options.max_context_blocks = 2;
    options.block_tokens = 3;
    options.max_context_nodes = seed % 2 == 0 ? 0 : 4;
    Problem p(RandomBatch(random, options), shapes[seed % 3], random);
    const auto plan = p.Forward(*ops);
    GuardedTensor d_out({p.batch.num_rows(), p.shape.q_heads, p.shape.head_dim}, 9);
    d_out.FillNormal(random);
    Gradients g(p);
    g.d_page_k.FillNormal(random);  // += is promised
    g.d_page_v.FillNormal(random);
    const reference::Vector page_k_before = g.d_page_k.ToDouble();
    const reference::Vector page_v_before = g.d_page_v.ToDouble();
    ASSERT_TRUE(g.Backward(*ops, p, *plan, d_out, true).ok());

    const reference::Vector seed_gradient = d_out.ToDouble();
    const auto check = [&](reference::Vector AttentionInputs::*input, const GuardedTensor& got,
                           const reference::Vector& before, const char* name) {
      const auto loss = [&](const reference::Vector& x) {
        AttentionInputs in = p.inputs();
        in.*input = x;
        return reference::Dot(reference::TreeAttention(p.batch, in, p.shape, p.scale),
                              seed_gradient);
      };
      reference::Vector want =
          reference::NumericGradient(loss, p.inputs().*input, tolerance::kFiniteDifferenceStep);
      for (size_t i = 0; i < before.size(); ++i) want[i] += before[i];
      // The floor: a row with one visible key has a d_q of zero, and rounding errors of its terms.
      EXPECT_LT(RelativeError(got, want, 1), tolerance::kOpBackward) << name;
      got.ExpectGuardsIntact(name);
    };
    check(&AttentionInputs::q, g.d_q, {}, "d_q");
    check(&AttentionInputs::k, g.d_k, {}, "d_k");
    check(&AttentionInputs::v, g.d_v, {}, "d_v");
    check(&AttentionInputs::page_k, g.d_page_k, page_k_before, "d_context.k");
    check(&AttentionInputs::page_v, g.d_page_v, page_v_before, "d_context.v");
  }
}

// Sizes at which tiles are full, partial and many: against the analytic gradient in double
// precision.
reference::Vector AnalyticGradient(const Problem& p, const reference::Vector& d_out,
                                   AttentionInputs* gradient) {
  const AttentionInputs in = p.inputs();
  reference::Vector lse;
  const reference::Vector out = reference::TreeAttention(p.batch, in, p.shape, p.scale, &lse);
  const int64_t dim = p.shape.head_dim, group = p.shape.q_heads / p.shape.kv_heads;
  *gradient = {reference::Vector(in.q.size()), reference::Vector(in.k.size()),
               reference::Vector(in.v.size()), reference::Vector(in.page_k.size()),
               reference::Vector(in.page_v.size())};
  for (int64_t row = 0; row < p.batch.num_rows(); ++row) {
    const reference::VisibleKeys visible = reference::Visible(p.batch, row);
    for (int64_t h = 0; h < p.shape.q_heads; ++h) {
      const int64_t at = (row * p.shape.q_heads + h) * dim;
      double delta = 0;
      for (int64_t d = 0; d < dim; ++d) delta += out[at + d] * d_out[at + d];
      const auto visit = [&](const double* key, const double* value, double* d_key,
                             double* d_value) {
        double score = 0, d_p = 0;
        for (int64_t d = 0; d < dim; ++d) {
          score += p.scale * in.q[at + d] * key[d];
          d_p += d_out[at + d] * value[d];
        }
        const double prob = std::exp(score - lse[row * p.shape.q_heads + h]);
        for (int64_t d = 0; d < dim; ++d) {
          gradient->q[at + d] += p.scale * prob * (d_p - delta) * key[d];
          d_key[d] += p.scale * prob * (d_p - delta) * in.q[at + d];
          d_value[d] += prob * d_out[at + d];
        }
      };
      for (const int64_t slot : visible.slots) {
        const int64_t key = (slot * p.shape.kv_heads + h / group) * dim;
        visit(&in.page_k[key], &in.page_v[key], &gradient->page_k[key], &gradient->page_v[key]);
      }
      for (const int64_t r : visible.rows) {
        const int64_t key = (r * p.shape.kv_heads + h / group) * dim;
        visit(&in.k[key], &in.v[key], &gradient->k[key], &gradient->v[key]);
      }
    }
  }
  return out;
}

TEST(TreeAttentionTest, BackwardMatchesReferenceAtFullTiles) {
  const auto ops = Cpu();
  for (uint64_t seed = 0; seed < 12; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(200 + seed);
    RandomBatchOptions options;
    options.max_node_rows = 150;
    options.block_tokens = 16;
    options.max_context_blocks = 6;
    options.max_context_nodes = seed % 2 == 0 ? 0 : 4;
    const AttentionShape shape =
        seed % 3 == 0 ? AttentionShape{6, 2, 64} : AttentionShape{2, 1, 20};
    Problem p(RandomBatch(random, options), shape, random);
    const auto plan = p.Forward(*ops);
    GuardedTensor d_out({p.batch.num_rows(), shape.q_heads, shape.head_dim});
    d_out.FillNormal(random);
    Gradients g(p);
    ASSERT_TRUE(g.Backward(*ops, p, *plan, d_out, true).ok());
    AttentionInputs want;
    AnalyticGradient(p, d_out.ToDouble(), &want);
    EXPECT_LT(RelativeError(g.d_q, want.q), tolerance::kOpBackward);
    EXPECT_LT(RelativeError(g.d_k, want.k), tolerance::kOpBackward);
    EXPECT_LT(RelativeError(g.d_v, want.v), tolerance::kOpBackward);
    EXPECT_LT(RelativeError(g.d_page_k, want.page_k), tolerance::kOpBackward);
    EXPECT_LT(RelativeError(g.d_page_v, want.page_v), tolerance::kOpBackward);
    for (const GuardedTensor* t : {&g.d_q, &g.d_k, &g.d_v, &g.d_page_k, &g.d_page_v}) {
      t->ExpectGuardsIntact("gradient");
    }
  }
}

TEST(TreeAttentionTest, BackwardIsBitEqualForEveryNumberOfThreads) {
  std::mt19937_64 random(12);
  RandomBatchOptions options;
  options.max_node_rows = 100;
  options.max_context_nodes = 3;
  Problem p(RandomBatch(random, options), {6, 2, 32}, random);
  GuardedTensor d_out({p.batch.num_rows(), 6, 32});
  d_out.FillNormal(random);
  std::vector<std::vector<float>> results;
  for (const int threads : {1, 2, 3, 3}) {
    const auto ops = Cpu(threads);
    const auto plan = p.Forward(*ops);
    Gradients g(p);
    ASSERT_TRUE(g.Backward(*ops, p, *plan, d_out, true).ok());
    std::vector<float> all = p.out.ToFloat();
    for (const GuardedTensor* t : {&g.d_q, &g.d_k, &g.d_v, &g.d_page_k, &g.d_page_v}) {
      const std::vector<float> values = t->ToFloat();
      all.insert(all.end(), values.begin(), values.end());
    }
    results.push_back(all);
  }
  for (size_t i = 1; i < results.size(); ++i) {
    ASSERT_EQ(0,
              std::memcmp(results[0].data(), results[i].data(), results[0].size() * sizeof(float)));
  }
}

TEST(TreeAttentionTest, BackwardWithoutContextGradientLeavesPagesAlone) {
  const auto ops = Cpu();
  std::mt19937_64 random(13);
  Problem p(Chain(5, 21, 16), {2, 1, 8}, random);
  const auto plan = p.Forward(*ops);
  GuardedTensor d_out({5, 2, 8});
  d_out.FillNormal(random);
  Gradients with(p), without(p);
  ASSERT_TRUE(with.Backward(*ops, p, *plan, d_out, true).ok());
  ASSERT_TRUE(without.Backward(*ops, p, *plan, d_out, false).ok());
  EXPECT_EQ(with.d_q.ToFloat(), without.d_q.ToFloat());
  EXPECT_EQ(with.d_k.ToFloat(), without.d_k.ToFloat());
  EXPECT_EQ(without.d_page_k.ToFloat(), std::vector<float>(without.d_page_k.size()));
}

}  // namespace
}  // namespace coppice
