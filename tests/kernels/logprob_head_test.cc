#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <tuple>
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

TensorView Ints(std::vector<int32_t>& v) {
  return View1D(v.data(), DType::kI32, static_cast<int64_t>(v.size()));
}

// Rows with no, one and several targets. Whole 16-byte pieces of bf16 stay whole in their rows.
struct HeadProblem {
  HeadProblem(int64_t head_rows, int64_t width, int64_t vocab_size, std::mt19937_64& random)
      : rows(head_rows),
        n(width),
        vocab(vocab_size),
        hidden({rows, n}, n % 8 == 0 ? 8 : 3),
        weight({vocab, n}, n % 8 == 0 ? 16 : 1),
        indptr(Indptr(rows)),
        targets(indptr.back()),
        logprobs({static_cast<int64_t>(targets.size())}),
        entropy({rows}),
        lse({rows}) {
    hidden.FillNormal(random);
    weight.FillNormal(random);
    for (int32_t& t : targets) {
      t = std::uniform_int_distribution<int32_t>(0, static_cast<int32_t>(vocab) - 1)(random);
    }
    if (targets.size() > 2) targets[2] = targets[1];  // two children may start with one token
  }
  static std::vector<int32_t> Indptr(int64_t rows) {
    std::vector<int32_t> v = {0};
    const int32_t counts[] = {1, 3, 0, 1, 2};
    for (int64_t r = 0; r < rows; ++r) v.push_back(v.back() + counts[r % 5]);
    return v;
  }
  absl::Status Forward(ops::Ops& ops, float temperature) {
    return ops.LogProbHead({.hidden = hidden.view(),
                            .weight = weight.view(),
                            .target_indptr = Ints(indptr),
                            .targets = Ints(targets),
                            .temperature = temperature,
                            .logprobs = logprobs.view(),
                            .entropy = entropy.view(),
                            .lse = lse.view(),
                            .kept = lent()});
  }
  // Without `d_entropy`, of log-probs alone.
  absl::Status Backward(ops::Ops& ops, float temperature, TensorView d_logprobs,
                        TensorView d_entropy, TensorView d_hidden, TensorView d_weight,
                        bool accumulate) {
    return ops.LogProbHeadBackward({.hidden = hidden.view(),
                                    .weight = weight.view(),
                                    .target_indptr = Ints(indptr),
                                    .targets = Ints(targets),
                                    .temperature = temperature,
                                    .lse = lse.view(),
                                    .entropy = entropy.view(),
                                    .d_logprobs = d_logprobs,
                                    .d_entropy = d_entropy,
                                    .d_hidden = d_hidden,
                                    .d_weight = d_weight,
                                    .accumulate_d_weight = accumulate,
                                    .kept = lent()});
  }
  // Lends both passes as much as a device can use that keeps 16 bits of each logit of some rows.
  void Lend(int64_t some) { kept.assign(some * (2 * (vocab + 8) + 4 * (vocab / 256 + 1)), 0); }
  TensorView lent() {
    return kept.empty() ? TensorView{}
                        : View1D(kept.data(), DType::kU8, static_cast<int64_t>(kept.size()));
  }
  reference::HeadResult Reference(const Vector& h, const Vector& w, double temperature) const {
    return reference::LogProbHead(h, w, n, vocab, indptr, targets, temperature);
  }

  int64_t rows, n, vocab;
  GuardedTensor hidden, weight;
  std::vector<int32_t> indptr, targets;
  GuardedTensor logprobs, entropy, lse;
  std::vector<uint8_t> kept;
};

using LogProbHeadTest = DeviceTest;
INSTANTIATE_TEST_SUITE_P(Devices, LogProbHeadTest, testing::ValuesIn(kDevices));

TEST_P(LogProbHeadTest, ForwardMatchesReferenceAroundTileSizes) {
  std::mt19937_64 random(1);
  for (const int64_t rows : Share(Scaled<Counts>({0, 1, 5, 255, 256, 257}, {0, 5, 257}))) {
    for (const int64_t vocab : Scaled<Counts>({1, 50, 4095, 4096, 4097}, {1, 4097})) {
      if (rows > 100 && vocab > 100 && vocab != 4097) continue;
      SCOPED_TRACE(testing::Message() << rows << " rows, vocab " << vocab);
      HeadProblem p(rows, 5, vocab, random);
      const absl::Status status = p.Forward(*ops_, 0.7f);
      ASSERT_TRUE(status.ok()) << status;
      const reference::HeadResult want =
          p.Reference(p.hidden.ToDouble(), p.weight.ToDouble(), 0.7f);
      EXPECT_LT(RelativeError(p.logprobs, want.logprobs, 1), forward_tolerance());
      EXPECT_LT(RelativeError(p.entropy, want.entropy, 1), forward_tolerance());
      EXPECT_LT(RelativeError(p.lse, want.lse, 1), forward_tolerance());
      p.logprobs.ExpectGuardsIntact("logprobs");
    }
  }
}

// Widths of whole 16-byte pieces may take a product that folds its logits: around its tiles of
// rows, tokens and columns, more tiles than a device takes at once, more rows than go together,
// several chunks of rows.
TEST_P(LogProbHeadTest, ForwardMatchesReferenceAtWholePieces) {
  struct Size {
    int64_t rows, n, vocab;
  };
  std::mt19937_64 random(6);
  for (const Size& s : Share(
           Scaled<std::vector<Size>>({{1, 8, 1},
                                      {1, 64, 255},
                                      {127, 72, 256},
                                      {128, 128, 257},
                                      {129, 8, 600},
                                      {256, 56, 511},
                                      {257, 16, 512},
                                      {3, 456, 700},
                                      {300, 72, 9000},
                                      {3200, 8, 300},
                                      {33000, 8, 12}},
                                     {{1, 8, 1}, {257, 72, 600}, {3, 456, 700}, {300, 8, 9000}}))) {
    SCOPED_TRACE(testing::Message() << s.rows << " rows of " << s.n << ", vocab " << s.vocab);
    HeadProblem p(s.rows, s.n, s.vocab, random);
    const absl::Status status = p.Forward(*ops_, 1.3f);
    ASSERT_TRUE(status.ok()) << status;
    const reference::HeadResult want = p.Reference(p.hidden.ToDouble(), p.weight.ToDouble(), 1.3f);
    EXPECT_LT(RelativeError(p.logprobs, want.logprobs, 1), forward_tolerance());
    EXPECT_LT(RelativeError(p.entropy, want.entropy, 1), forward_tolerance());
    EXPECT_LT(RelativeError(p.lse, want.lse, 1), forward_tolerance());
    p.logprobs.ExpectGuardsIntact("logprobs");
  }
}

// At widths of whole pieces on every device.
TEST_P(LogProbHeadTest, RowsDoNotDependOnTheirBatch) {
  if (on_cuda() && IsPortable()) GTEST_SKIP() << "cuBLASLt's product follows the number of rows";
  std::mt19937_64 random(7);
  HeadProblem all(300, 72, 1100, random);
  ASSERT_TRUE(all.Forward(*ops_, 1).ok());
  for (const int64_t row : {0, 77, 128, 299}) {
    HeadProblem one(1, 72, 1100, random);
    for (int64_t i = 0; i < one.n; ++i) one.hidden[i] = all.hidden[row * all.n + i];
    for (int64_t i = 0; i < one.vocab * one.n; ++i) one.weight[i] = all.weight[i];
    ASSERT_TRUE(one.Forward(*ops_, 1).ok());
    EXPECT_EQ(one.lse[0], all.lse[row]);
    EXPECT_EQ(one.entropy[0], all.entropy[row]);
  }
}

TEST_P(LogProbHeadTest, PeakedLogitsStayFinite) {
  std::mt19937_64 random(2);
  for (const int64_t n : {4, 8}) {
    HeadProblem p(3, n, 100, random);
    for (int64_t i = 0; i < 3 * n; ++i) p.hidden[i] *= 1024;
    ASSERT_TRUE(p.Forward(*ops_, 1).ok());
    const reference::HeadResult want = p.Reference(p.hidden.ToDouble(), p.weight.ToDouble(), 1);
    EXPECT_LT(RelativeError(p.logprobs, want.logprobs, 1), forward_tolerance());
    EXPECT_LT(RelativeError(p.lse, want.lse, 1), forward_tolerance());
    EXPECT_LT(RelativeError(p.entropy, want.entropy, 1), backward_tolerance());
  }
}

TEST_P(LogProbHeadTest, BackwardMatchesFiniteDifferences) {
  std::mt19937_64 random(3);
  struct Size {
    int64_t rows, n, vocab;
  };
  for (const Size& s : Scaled<std::vector<Size>>({{1, 3, 7}, {5, 4, 40}, {9, 2, 19}, {5, 8, 40}},
                                                 {{9, 2, 19}, {5, 8, 40}})) {
    for (const bool with_entropy : {false, true}) {
      for (const float temperature : Scaled<std::vector<float>>({1.0f, 0.6f}, {0.6f})) {
        HeadProblem p(s.rows, s.n, s.vocab, random);
        ASSERT_TRUE(p.Forward(*ops_, temperature).ok());
        GuardedTensor d_logprobs({p.logprobs.size()}), d_entropy({s.rows});
        GuardedTensor d_hidden({s.rows, s.n}, 2), d_weight({s.vocab, s.n}, 3);
        for (GuardedTensor* t : {&d_logprobs, &d_entropy, &d_weight}) t->FillNormal(random);
        const Vector before = d_weight.ToDouble();
        ASSERT_TRUE(p.Backward(*ops_, temperature, d_logprobs.view(),
                               with_entropy ? d_entropy.view() : TensorView{}, d_hidden.view(),
                               d_weight.view(), /*accumulate=*/true)
                        .ok());
        const auto loss = [&](const Vector& h, const Vector& w) {
          const reference::HeadResult r = p.Reference(h, w, temperature);
          return reference::Dot(r.logprobs, d_logprobs.ToDouble()) +
                 (with_entropy ? reference::Dot(r.entropy, d_entropy.ToDouble()) : 0.0);
        };
        const Vector h = p.hidden.ToDouble(), w = p.weight.ToDouble();
        const Vector want_hidden = reference::NumericGradient(
            [&](const Vector& x) { return loss(x, w); }, h, tolerance::kFiniteDifferenceStep);
        Vector want_weight = reference::NumericGradient([&](const Vector& x) { return loss(h, x); },
                                                        w, tolerance::kFiniteDifferenceStep);
        for (size_t i = 0; i < before.size(); ++i) want_weight[i] += before[i];
        EXPECT_LT(RelativeError(d_hidden, want_hidden), backward_tolerance());
        EXPECT_LT(RelativeError(d_weight, want_weight), backward_tolerance());
        d_hidden.ExpectGuardsIntact("d_hidden");
        d_weight.ExpectGuardsIntact("d_weight");
      }
    }
  }
}

// Backward against the formula in double precision, first added to what is there, then written over
// it.
void ExpectBackwardMatches(HeadProblem& p, ops::Ops& ops, double tolerance,
                           std::mt19937_64& random) {
  ASSERT_TRUE(p.Forward(ops, 1).ok());
  GuardedTensor d_logprobs({p.logprobs.size()}), d_entropy({p.rows});
  GuardedTensor d_hidden({p.rows, p.n}), d_weight({p.vocab, p.n});
  d_logprobs.FillNormal(random);
  d_entropy.FillNormal(random);
  const reference::HeadResult r = p.Reference(p.hidden.ToDouble(), p.weight.ToDouble(), 1);
  Vector want_hidden(p.rows * p.n), want_weight(p.vocab * p.n);
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t j = 0; j < p.vocab; ++j) {
      double z = 0;
      for (int64_t i = 0; i < p.n; ++i)
        z += double{p.hidden[row * p.n + i]} * p.weight[j * p.n + i];
      const double log_p = z - r.lse[row], prob = std::exp(log_p);
      double d_z = -double{d_entropy[row]} * prob * (log_p + r.entropy[row]);
      for (int32_t t = p.indptr[row]; t < p.indptr[row + 1]; ++t) {
        d_z += d_logprobs[t] * ((p.targets[t] == j ? 1.0 : 0.0) - prob);
      }
      for (int64_t i = 0; i < p.n; ++i) {
        want_hidden[row * p.n + i] += d_z * p.weight[j * p.n + i];
        want_weight[j * p.n + i] += d_z * p.hidden[row * p.n + i];
      }
    }
  }
  for (const bool accumulate : {true, false}) {
    ASSERT_TRUE(p.Backward(ops, 1, d_logprobs.view(), d_entropy.view(), d_hidden.view(),
                           d_weight.view(), accumulate)
                    .ok());
    EXPECT_LT(RelativeError(d_hidden, want_hidden), tolerance);
    EXPECT_LT(RelativeError(d_weight, want_weight), tolerance);
  }
}

TEST_P(LogProbHeadTest, BackwardMatchesReferenceOverSeveralTiles) {
  std::mt19937_64 random(4);
  HeadProblem narrow(Scaled(300, 30), 3, 4500, random), pieces(300, 72, 1100, random),
      chunks(8300, 8, 40, random), odd_vocab(130, 136, 513, random);
  for (HeadProblem* p : Share(Scaled<std::vector<HeadProblem*>>(
           {&narrow, &pieces, &chunks, &odd_vocab}, {&narrow, &pieces, &odd_vocab}))) {
    SCOPED_TRACE(testing::Message() << p->rows << " rows of " << p->n << ", vocab " << p->vocab);
    ExpectBackwardMatches(*p, *ops_, backward_tolerance(), random);
  }
}

TEST_P(LogProbHeadTest, BackwardMatchesReferenceWithWhatForwardKept) {
  std::mt19937_64 random(8);
  struct Size {
    int64_t rows, lent, n, vocab;
  };
  for (const auto& [rows, lent, n, vocab] : Share(Scaled<std::vector<Size>>(
           {{1, 1, 8, 2},
            {5, 5, 8, 40},
            {130, 130, 136, 513},
            {257, 257, 72, 1100},
            {300, 300, 3, 300},
            {600, 400, 72, 300},
            {8600, 300, 8, 12},
            {33000, 33000, 8, 12},
            {33400, 27246, 8, 12}},
           {{5, 5, 8, 40}, {130, 130, 136, 513}, {300, 300, 3, 300}, {600, 400, 72, 300}}))) {
    SCOPED_TRACE(testing::Message()
                 << lent << " of " << rows << " rows of " << n << ", vocab " << vocab);
    HeadProblem p(rows, n, vocab, random);
    p.Lend(lent);
    ExpectBackwardMatches(p, *ops_, backward_tolerance(), random);
  }
}

// One probability near 1 a row: its gradient is what is left of 1.
TEST_P(LogProbHeadTest, PeakedGradientsKeepTheirPrecision) {
  std::mt19937_64 random(9);
  HeadProblem p(40, 8, 600, random);
  for (int64_t i = 0; i < p.rows * p.n; ++i) p.hidden[i] *= 2;
  for (int32_t row = 0; row < p.rows; ++row) {
    int64_t best = 0;
    double most = -1e9;
    for (int64_t j = 0; j < p.vocab; ++j) {
      double z = 0;
      for (int64_t i = 0; i < p.n; ++i)
        z += double{p.hidden[row * p.n + i]} * p.weight[j * p.n + i];
      if (z > most) most = z, best = j;
    }
    for (int32_t t = p.indptr[row]; t < p.indptr[row + 1]; ++t)
      p.targets[t] = static_cast<int32_t>(best);
  }
  p.Lend(p.rows);
  ExpectBackwardMatches(p, *ops_, backward_tolerance(), random);
}

TEST_P(LogProbHeadTest, WhatIsLentIsUsedAndChangesNoBit) {
  if (on_cuda() && IsPortable()) GTEST_SKIP() << "the kernel for sm_90a alone keeps exps";
  std::mt19937_64 random(10);
  HeadProblem p(300, 72, Scaled(1100, 200), random);
  GuardedTensor d_logprobs({p.logprobs.size()}), d_entropy({p.rows});
  d_logprobs.FillNormal(random);
  d_entropy.FillNormal(random);
  std::vector<std::vector<float>> first;
  GuardedTensor d_hidden({p.rows, p.n}), d_weight({p.vocab, p.n});
  const auto backward = [&] {
    return p.Backward(*ops_, 0.7f, d_logprobs.view(), d_entropy.view(), d_hidden.view(),
                      d_weight.view(), /*accumulate=*/false);
  };
  // None, less than a tile of rows, one of two, all.
  for (const int64_t lent : {0, 200, 280, 300}) {
    p.Lend(lent);
    ASSERT_TRUE(p.Forward(*ops_, 0.7f).ok());
    const auto written =
        std::count_if(p.kept.begin(), p.kept.end(), [](uint8_t byte) { return byte != 0; });
    EXPECT_EQ(written > 0, on_cuda() && lent > 256) << lent;
    ASSERT_TRUE(backward().ok());
    const std::vector<std::vector<float>> got = {p.logprobs.ToFloat(), p.entropy.ToFloat(),
                                                 p.lse.ToFloat(), d_hidden.ToFloat(),
                                                 d_weight.ToFloat()};
    if (first.empty()) first = got;
    EXPECT_EQ(got, first) << lent;
  }
  // And backward reads it.
  ASSERT_TRUE(p.Forward(*ops_, 0.7f).ok());
  std::fill(p.kept.begin(), p.kept.end(), 0);
  ASSERT_TRUE(backward().ok());
  EXPECT_EQ(d_hidden.ToFloat() != first[3], on_cuda());
}

TEST_P(LogProbHeadTest, BadTargetsAreRefused) {
  std::mt19937_64 random(5);
  HeadProblem p(5, 3, 10, random);
  p.targets[0] = 10;
  EXPECT_EQ(p.Forward(*ops_, 1).code(), absl::StatusCode::kInvalidArgument);
  p.targets[0] = 0;
  p.indptr[1] = -1;
  EXPECT_EQ(p.Forward(*ops_, 1).code(), absl::StatusCode::kInvalidArgument);
  p.indptr[1] = 1;
  EXPECT_EQ(p.Forward(*ops_, 0).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(p.Forward(*ops_, 1).ok());
}

}  // namespace
}  // namespace coppice
