#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "kernels/ops/ops.h"
#include "tests/support/device_test.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/reference.h"
#include "tests/support/share.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

using ops::SamplingRow;
using reference::Vector;

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

struct Result {
  std::vector<int32_t> tokens, top_ids;
  std::vector<float> raw, sampled, tempered, top_values;
};

class SamplingTest : public DeviceTest {
 protected:
  // Samples one token per row of `rows`, all from the same logits.
  absl::StatusOr<Result> TrySample(const std::vector<float>& logits,
                                   const std::vector<SamplingRow>& rows, int32_t top = 0,
                                   std::vector<std::pair<int32_t, float>> biases = {}) {
    const int64_t n = static_cast<int64_t>(rows.size()),
                  vocab = static_cast<int64_t>(logits.size());
    GuardedTensor tensor({n, vocab}, 3);
    for (int64_t i = 0; i < n * vocab; ++i) tensor[i] = logits[i % vocab];
    std::vector<int32_t> bias_ids;
    std::vector<float> bias_values;
    for (const auto& [id, value] : biases) {
      bias_ids.push_back(id);
      bias_values.push_back(value);
    }
    Result r;
    r.tokens.resize(n);
    for (auto* v : {&r.raw, &r.sampled, &r.tempered}) v->resize(n);
    r.top_ids.resize(n * top);
    r.top_values.resize(n * top);
    const absl::Status status = ops_->Sample({.logits = tensor.view(),
                                              .rows = rows.data(),
                                              .bias_ids = bias_ids.data(),
                                              .bias_values = bias_values.data(),
                                              .top_logprobs = top,
                                              .tokens = r.tokens.data(),
                                              .raw_logprobs = r.raw.data(),
                                              .sampled_logprobs = r.sampled.data(),
                                              .tempered_logprobs = r.tempered.data(),
                                              .top_ids = r.top_ids.data(),
                                              .top_values = r.top_values.data()});
    tensor.ExpectGuardsIntact("logits");
    if (!status.ok()) return status;
    return r;
  }
  Result Sample(const std::vector<float>& logits, const std::vector<SamplingRow>& rows,
                int32_t top = 0, std::vector<std::pair<int32_t, float>> biases = {}) {
    auto r = TrySample(logits, rows, top, std::move(biases));
    EXPECT_TRUE(r.ok()) << r.status();
    return r.ok() ? *r : Result{std::vector<int32_t>(rows.size())};
  }
  // Draws by kind that differ in their position only: n of each kind, all in one batch.
  std::vector<std::vector<int32_t>> Draws(const std::vector<float>& logits,
                                          const std::vector<SamplingRow>& kinds, int n,
                                          std::vector<std::pair<int32_t, float>> biases = {}) {
    const auto each = static_cast<size_t>(Scaled(n, 3));
    std::vector<SamplingRow> rows;
    for (const SamplingRow& kind : kinds) {
      rows.insert(rows.end(), each, kind);
      for (size_t i = 0; i < each; ++i) rows[rows.size() - each + i].position = i;
    }
    const std::vector<int32_t> tokens = Sample(logits, rows, 0, std::move(biases)).tokens;
    std::vector<std::vector<int32_t>> draws;
    for (size_t i = 0; i < tokens.size(); i += each)
      draws.emplace_back(tokens.begin() + i, tokens.begin() + i + each);
    return draws;
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, SamplingTest, testing::ValuesIn(kDevices));

std::vector<float> RandomLogits(uint64_t seed, int n, float spread) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(n);
  for (float& x : logits) x = normal(random);
  return logits;
}

Vector Softmax(const std::vector<float>& logits, double temperature) {
  const double max = *std::max_element(logits.begin(), logits.end());
  Vector p;
  for (const float x : logits) p.push_back(std::exp((x - max) / temperature));
  const double sum = std::accumulate(p.begin(), p.end(), 0.0);
  for (double& x : p) x /= sum;
  return p;
}

// Probability that a chi-square variable with k degrees of freedom exceeds x (Wilson & Hilferty
// 1931).
double ChiSquareTail(double x, double k) {
  const double z = (std::cbrt(x / k) - (1 - 2 / (9 * k))) / std::sqrt(2 / (9 * k));
  return 0.5 * std::erfc(z / std::sqrt(2.0));
}

// Tokens too rare to be counted alone are one cell. At small scale only what is impossible is
// checked.
void ExpectDistribution(const std::vector<int32_t>& draws, const Vector& probability) {
  constexpr double kFew = 5;
  Vector count(probability.size());
  for (const int32_t t : draws) count[t] += 1;
  double statistic = 0, cells = 0, rare = 0, rare_expected = 0;
  const auto add_cell = [&](double got, double expected) {
    statistic += (got - expected) * (got - expected) / expected;
    cells += 1;
  };
  for (size_t i = 0; i < probability.size(); ++i) {
    const double expected = probability[i] * static_cast<double>(draws.size());
    if (expected == 0) {
      EXPECT_EQ(count[i], 0) << "token " << i << " has probability 0";
    } else if (expected <= kFew) {
      rare += count[i];
      rare_expected += expected;
    } else {
      add_cell(count[i], expected);
    }
  }
  if (rare_expected > kFew) add_cell(rare, rare_expected);
  if (!SmallScale()) {
    EXPECT_GE(cells, 1) << "too few draws to check anything";
  }
  const double tail = cells > 1 ? ChiSquareTail(statistic, cells - 1) : 1.0;
  EXPECT_GT(tail, tolerance::kChiSquareSignificance);
}

// The distribution after the filters, by the definitions.
Vector Filtered(Vector p, const SamplingRow& row) {
  std::vector<int> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return p[a] > p[b]; });
  size_t kept = row.top_k > 0 ? std::min<size_t>(row.top_k, p.size()) : p.size();
  double mass = 0, reached = 0;
  for (size_t i = 0; i < kept; ++i) mass += p[order[i]];
  size_t nucleus = 0;
  while (nucleus < kept && reached < row.top_p * mass) reached += p[order[nucleus++]];
  kept = row.top_p < 1 ? nucleus : kept;
  Vector result(p.size());
  for (size_t i = 0; i < kept; ++i) {
    if (p[order[i]] >= row.min_p * p[order[0]]) result[order[i]] = p[order[i]];
  }
  const double sum = std::accumulate(result.begin(), result.end(), 0.0);
  for (double& x : result) x /= sum;
  return result;
}

TEST_P(SamplingTest, DrawsFollowTheDistribution) {
  const std::vector<float> logits = RandomLogits(1, 20, 1);
  std::vector<SamplingRow> kinds = {
      {.temperature = 1},
      {.temperature = 0.7f},
      {.temperature = 1.5f},
      {.temperature = 1, .top_k = 5},
      {.temperature = 1, .top_p = 0.8f},
      {.temperature = 1, .min_p = 0.3f},
      {.temperature = 0.9f, .top_k = 10, .top_p = 0.9f, .min_p = 0.1f},
      {.temperature = 1, .top_k = 1},
      {.temperature = 1, .top_p = 1e-6f},
  };
  for (SamplingRow& row : kinds) row.seed = 77;
  const auto draws = Draws(logits, kinds, 20000);
  for (size_t i = 0; i < kinds.size(); ++i) {
    const SamplingRow& row = kinds[i];
    SCOPED_TRACE(testing::Message() << "temperature " << row.temperature << " top_k " << row.top_k
                                    << " top_p " << row.top_p << " min_p " << row.min_p);
    ExpectDistribution(draws[i], Filtered(Softmax(logits, row.temperature), row));
  }
}

TEST_P(SamplingTest, LogProbsAreThoseOfRawTemperedAndFilteredDistributions) {
  const std::vector<float> logits = RandomLogits(2, 300, 2);
  std::vector<SamplingRow> rows;
  for (int i = 0; i < Repeats(50); ++i) {
    rows.push_back({.temperature = 0.8f,
                    .top_k = 40,
                    .top_p = 0.9f,
                    .seed = 3,
                    .position = static_cast<uint32_t>(i)});
  }
  const Result r = Sample(logits, rows);
  const Vector raw = Softmax(logits, 1), tempered = Softmax(logits, 0.8f);
  const Vector filtered = Filtered(tempered, rows[0]);
  for (size_t i = 0; i < rows.size(); ++i) {
    EXPECT_NEAR(r.raw[i], std::log(raw[r.tokens[i]]), tolerance::kLogProb);
    EXPECT_NEAR(r.tempered[i], std::log(tempered[r.tokens[i]]), tolerance::kLogProb);
    EXPECT_NEAR(r.sampled[i], std::log(filtered[r.tokens[i]]), tolerance::kLogProb);
  }
}

// A vocabulary in which the nucleus is larger than the pieces that are sorted.
TEST_P(SamplingTest, LargeNucleusHasTheRightProbabilities) {
  const std::vector<float> logits = RandomLogits(5, 5000, 0.3f);
  const Vector p = Softmax(logits, 1);
  const int each = Repeats(200);
  std::vector<SamplingRow> rows;
  for (const float top_p : {0.01f, 0.1f, 0.5f, 0.95f}) {
    for (int i = 0; i < each; ++i) {
      rows.push_back(
          {.temperature = 1, .top_p = top_p, .seed = 8, .position = static_cast<uint32_t>(i)});
    }
  }
  const Result r = Sample(logits, rows);
  Vector filtered;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (i % each == 0) filtered = Filtered(p, rows[i]);
    EXPECT_NEAR(r.sampled[i], std::log(filtered[r.tokens[i]]), tolerance::kLogProb)
        << "top_p " << rows[i].top_p;
  }
}

TEST_P(SamplingTest, TheSameCounterGivesTheSameTokenInAnyBatch) {
  const std::vector<float> logits = RandomLogits(4, 1000, 1);
  std::vector<SamplingRow> rows;
  for (uint32_t i = 0; i < static_cast<uint32_t>(Repeats(40)); ++i) {
    rows.push_back({.temperature = 1,
                    .top_p = i % 2 ? 0.9f : 1.0f,
                    .seed = 9,
                    .sample = i % 5,
                    .position = i});
  }
  const Result batch = Sample(logits, rows);
  for (size_t i = Scaled(0, 1); i < rows.size(); ++i) {
    const Result alone = Sample(logits, {rows[i]});
    EXPECT_EQ(alone.tokens[0], batch.tokens[i]);
    EXPECT_EQ(alone.sampled[0], batch.sampled[i]);
  }
  const int num_samples = Repeats(20);
  std::vector<SamplingRow> samples(num_samples, rows[0]);
  for (int i = 0; i < num_samples; ++i) samples[i].sample = i;
  std::vector<int32_t> tokens = Sample(logits, samples).tokens;
  std::sort(tokens.begin(), tokens.end());
  EXPECT_GT(std::unique(tokens.begin(), tokens.end()) - tokens.begin(), num_samples / 2);
}

TEST_P(SamplingTest, GreedyTakesTheLowestIdOfTheLargest) {
  const std::vector<float> logits = {0, 3, 1, 3, kMinusInf};
  const Result r = Sample(logits, {{.temperature = 0}}, 3);
  EXPECT_EQ(r.tokens[0], 1);
  EXPECT_EQ(r.sampled[0], 0);
  EXPECT_NEAR(r.raw[0], std::log(Softmax(logits, 1)[1]), tolerance::kLogProb);
  EXPECT_EQ(r.tempered[0], r.raw[0]);
  EXPECT_EQ(r.top_ids, (std::vector<int32_t>{1, 3, 2}));
  EXPECT_NEAR(r.top_values[2], std::log(Softmax(logits, 1)[2]), tolerance::kLogProb);
}

TEST_P(SamplingTest, TinyTemperatureIsGreedyAndSplitsTies) {
  const std::vector<float> logits = {0, 3, 1, 3, 2.9f};
  const std::vector<SamplingRow> kinds = {{.temperature = 1e-3f, .seed = 5},
                                          {.temperature = 1e-10f, .seed = 5},
                                          {.temperature = 1e-38f, .seed = 5},
                                          {.temperature = 1e-42f, .seed = 5}};
  for (const auto& draws : Draws(logits, kinds, 2000))
    ExpectDistribution(draws, {0, 0.5, 0, 0.5, 0});
}

TEST_P(SamplingTest, MinusInfinityIsNeverDrawn) {
  const std::vector<float> logits = {kMinusInf, 1, kMinusInf, 1, kMinusInf};
  const std::vector<SamplingRow> kinds = {{.temperature = 1},
                                          {.temperature = 100},
                                          {.temperature = 1, .top_k = 4},
                                          {.temperature = 1, .top_p = 0.999f}};
  for (const auto& draws : Draws(logits, kinds, 2000))
    ExpectDistribution(draws, {0, 0.5, 0, 0.5, 0});
}

TEST_P(SamplingTest, BiasMovesTheDrawButNotTheRawLogProb) {
  const std::vector<float> logits = RandomLogits(6, 50, 1);
  const SamplingRow row = {.temperature = 0.5f, .bias_begin = 0, .bias_end = 2};
  const Result forced = Sample(logits, {row}, 0, {{7, 100.0f}, {8, kMinusInf}});
  EXPECT_EQ(forced.tokens[0], 7);
  EXPECT_NEAR(forced.raw[0], std::log(Softmax(logits, 1)[7]), tolerance::kLogProb);
  EXPECT_NEAR(forced.tempered[0], std::log(Softmax(logits, 0.5)[7]), tolerance::kLogProb);
  EXPECT_NEAR(forced.sampled[0], 0, tolerance::kLogProb);
  SamplingRow greedy = row;
  greedy.temperature = 0;
  EXPECT_EQ(Sample(logits, {greedy}, 0, {{7, 50.0f}, {7, 50.0f}}).tokens[0], 7);
  // The order is bias, then temperature: a bias of log 3 at temperature 1 triples the odds.
  const auto draws =
      Draws({0, 0}, {{.temperature = 1, .seed = 1, .bias_end = 1}}, 5000, {{1, std::log(3.0f)}});
  ExpectDistribution(draws[0], {0.25, 0.75});
}

TEST_P(SamplingTest, TopLogprobsAreSortedAndComplete) {
  const std::vector<float> logits = RandomLogits(8, 5, 1);
  const int top = Scaled(20, 6);
  const Result r = Sample(logits, {{.temperature = 1}}, top);
  const Vector p = Softmax(logits, 1);
  for (int i = 0; i < 5; ++i)
    EXPECT_NEAR(r.top_values[i], std::log(p[r.top_ids[i]]), tolerance::kLogProb);
  EXPECT_TRUE(std::is_sorted(r.top_values.rbegin() + (top - 5), r.top_values.rend()));
  EXPECT_EQ(r.top_ids[5], -1);
}

TEST_P(SamplingTest, ARowWithNothingToDrawLeavesTheOthers) {
  constexpr int64_t kRows = 5, kVocab = 700;
  std::vector<float> logits = RandomLogits(9, kRows * kVocab, 2);
  const std::vector<SamplingRow> rows(kRows, {.temperature = 1, .seed = 5});
  const auto draw = [&](std::vector<int32_t>& tokens, std::vector<float>& raw) {
    tokens.assign(kRows, 77);
    raw.assign(kRows, 0);
    std::vector<float> sampled(kRows);
    return ops_->Sample({.logits = View2D(logits.data(), DType::kF32, kRows, kVocab),
                         .rows = rows.data(),
                         .tokens = tokens.data(),
                         .raw_logprobs = raw.data(),
                         .sampled_logprobs = sampled.data()});
  };
  std::vector<int32_t> want, got;
  std::vector<float> want_raw, got_raw;
  ASSERT_TRUE(draw(want, want_raw).ok());
  logits[1 * kVocab + 3] = NAN;
  std::fill_n(logits.begin() + 3 * kVocab, kVocab, kMinusInf);
  const absl::Status status = draw(got, got_raw);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("row 1:"), absl::string_view::npos) << status;
  for (const int64_t row : {0, 2, 4}) {
    EXPECT_EQ(got[row], want[row]) << row;
    EXPECT_EQ(got_raw[row], want_raw[row]) << row;
  }
  for (const int64_t row : {1, 3}) EXPECT_EQ(got[row], -1) << row;
}

TEST_P(SamplingTest, BadRowsAreRefused) {
  const std::vector<float> logits = {0, 1};
  const SamplingRow bad[] = {{.temperature = -1},
                             {.temperature = NAN},
                             {.temperature = INFINITY},
                             {.temperature = 1, .top_p = 0},
                             {.temperature = 1, .top_p = 1.5f},
                             {.temperature = 1, .top_p = NAN},
                             {.temperature = 1, .min_p = 1},
                             {.temperature = 1, .min_p = -0.1f}};
  for (const SamplingRow& row : bad) {
    EXPECT_EQ(TrySample(logits, {row}).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_FALSE(TrySample(logits, {{.bias_end = 1}}, 0, {{2, 1.0f}}).ok());
  EXPECT_FALSE(TrySample({kMinusInf, kMinusInf}, {{}}).ok());
  EXPECT_FALSE(TrySample({0, NAN}, {{}}).ok());
  EXPECT_FALSE(TrySample({0, INFINITY}, {{}}).ok());
  EXPECT_FALSE(TrySample({0, INFINITY}, {{.temperature = 0}}).ok());
  EXPECT_FALSE(TrySample({0, kMinusInf}, {{.bias_end = 1}}, 0, {{0, kMinusInf}}).ok());
}

// Two batches in flight: the second is queued before the first is read, its rows hold other draws,
// and each result appears when it is waited for, whatever came after it.
TEST_P(SamplingTest, ResultsWaitUntilTheyAreAskedFor) {
  constexpr int64_t kVocab = 999, kRows = 2;
  const uint32_t num_batches = Repeats(24);  // more than are staged at a time
  auto device = std::move(CreateTestOps(GetParam())).value();
  const std::vector<float> logits = RandomLogits(5, kRows * kVocab, 2);
  auto memory = device->Allocate(kRows * kVocab * 4, "logits").value();
  auto drawn_memory = device->Allocate(kRows * 4, "drawn").value();
  const TensorView view = View2D(memory.data(), DType::kF32, kRows, kVocab);
  const TensorView drawn = View1D(drawn_memory.data(), DType::kI32, kRows);
  ASSERT_TRUE(device->Upload(logits.data(), view).ok());
  struct Batch {
    std::vector<int32_t> tokens = std::vector<int32_t>(kRows, -1), ids = tokens;
    std::vector<float> raw = std::vector<float>(kRows), sampled = raw, values = raw;
    std::unique_ptr<ops::PendingSample> pending;
  };
  const auto start = [&](uint32_t position, Batch& batch) {
    std::vector<SamplingRow> rows(kRows, {.seed = 3, .position = position});
    for (int64_t i = 0; i < kRows; ++i) rows[i].sample = static_cast<uint32_t>(i);
    auto pending = device->StartSample({.logits = view,
                                        .rows = rows.data(),
                                        .top_logprobs = 1,
                                        .drawn = drawn,
                                        .tokens = batch.tokens.data(),
                                        .raw_logprobs = batch.raw.data(),
                                        .sampled_logprobs = batch.sampled.data(),
                                        .top_ids = batch.ids.data(),
                                        .top_values = batch.values.data()});
    ASSERT_TRUE(pending.ok()) << pending.status();
    batch.pending = *std::move(pending);
  };
  std::vector<Batch> batches(num_batches), again(num_batches);
  for (uint32_t b = 0; b < num_batches; ++b) {
    start(b, again[b]);
    ASSERT_TRUE(again[b].pending->Wait().ok());
    again[b].pending.reset();
  }
  start(0, batches[0]);
  for (uint32_t b = 0; b < num_batches; ++b) {
    if (b + 1 < num_batches) start(b + 1, batches[b + 1]);
    EXPECT_EQ(batches[b].tokens, std::vector<int32_t>(kRows, -1));
    ASSERT_TRUE(batches[b].pending->Wait().ok());
    batches[b].pending.reset();
    EXPECT_EQ(batches[b].tokens, again[b].tokens);
    EXPECT_EQ(batches[b].raw, again[b].raw);
    EXPECT_EQ(batches[b].ids, again[b].ids);
  }
  std::vector<int32_t> on_device(kRows);
  ASSERT_TRUE(device->Download(drawn, on_device.data()).ok());
  EXPECT_EQ(on_device, batches.back().tokens);
}

}  // namespace
}  // namespace coppice
