// Every table of kernels that this processor can run, not only the one that it chooses, against
// plain loops in double.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "kernels/cpu/simd/kernels.h"
#include "tests/support/tolerances.h"

namespace coppice::cpu {
namespace {

std::vector<float> Random(std::mt19937_64& random, int64_t n, float deviation = 1) {
  std::normal_distribution<float> normal(0, deviation);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

class SimdTest : public testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& kernels() { return *GetParam(); }
  std::mt19937_64 random_{1};
};

TEST_P(SimdTest, ExpIsAccurateAndRespectsTheEnds) {
  std::vector<float> x;
  for (float v = -87.3f; v < 88.3f; v += 0.0137f) x.push_back(v);
  const size_t plain = x.size();
  for (const float v : {-INFINITY, -1000.0f, -88.0f, 0.0f, NAN}) x.push_back(v);
  std::vector<float> y(x.size());
  kernels().exp_shifted(x.data(), 0, 1, y.data(), static_cast<int64_t>(x.size()));
  for (size_t i = 0; i < plain; ++i) {
    EXPECT_NEAR(y[i] / std::exp(double{x[i]}), 1, tolerance::kElementary) << x[i];
  }
  for (size_t i = plain; i < plain + 3; ++i) EXPECT_EQ(y[i], 0) << x[i];
  EXPECT_EQ(y[plain + 3], 1);
  EXPECT_TRUE(std::isnan(y[plain + 4]));
}

TEST_P(SimdTest, DotGemmMatchesLoops) {
  for (const int64_t m : {1, 2, 3, 4, 5, 9}) {
    for (const int64_t n : {1, 4, 6, 7, 13}) {
      for (const int64_t k : {1, 3, 4, 8, 15, 16, 17, 100}) {
        const auto a = Random(random_, m * k), b = Random(random_, n * k);
        auto c = Random(random_, m * n);
        const auto before = c;
        for (const bool accumulate : {true, false}) {
          c = before;
          kernels().dot_gemm({m, n, k, a.data(), k, b.data(), k, c.data(), n, accumulate});
          for (int64_t i = 0; i < m * n; ++i) {
            double want = accumulate ? before[i] : 0.0;
            for (int64_t p = 0; p < k; ++p) want += double{a[i / n * k + p]} * b[i % n * k + p];
            ASSERT_NEAR(c[i], want, tolerance::kOpForward * std::sqrt(k) * 4) << m << n << k;
          }
        }
      }
    }
  }
}

TEST_P(SimdTest, PackingTransposesAndPads) {
  for (const int64_t head_dim : {2, 16, 20, 64}) {
    for (const int64_t n : {1, 17, 64}) {
      const int64_t dim = PadHeadDim(head_dim);
      const auto data = Random(random_, n * head_dim);
      std::vector<const float*> vectors;
      for (int64_t i = 0; i < n; ++i) vectors.push_back(data.data() + i * head_dim);
      std::vector<float> columns(dim * kTileKeys, 7), rows(dim * kTileKeys, 7);
      kernels().pack_columns(vectors.data(), n, head_dim, dim, columns.data());
      kernels().pack_rows(vectors.data(), n, head_dim, dim, rows.data());
      for (int64_t i = 0; i < kTileKeys; ++i) {
        for (int64_t d = 0; d < dim; ++d) {
          const float want = i < n && d < head_dim ? vectors[i][d] : 0;
          ASSERT_EQ(columns[d * kTileKeys + i], want);
          ASSERT_EQ(rows[i * dim + d], want);
        }
      }
    }
  }
}

TEST_P(SimdTest, AttentionTilesMatchOneSoftmax) {
  const int64_t m = 7, dim = 32, tiles = 3, keys = tiles * kTileKeys;
  const auto q = Random(random_, m * dim), k = Random(random_, keys * dim, 0.3f);
  const auto v = Random(random_, keys * dim);
  std::vector<float> scores(m * kTileKeys), max(m, -INFINITY), sum(m, 0), out(m * dim, 0);
  const auto seen = [](int64_t i) { return 1 + i * 29; };  // keys that query i sees, of 192
  for (int64_t t = 0; t < tiles; ++t) {
    std::vector<float> k_t(dim * kTileKeys);
    std::vector<int32_t> visible;
    for (int64_t i = 0; i < m; ++i)
      visible.push_back(static_cast<int32_t>(seen(i) - t * kTileKeys));
    for (int64_t j = 0; j < kTileKeys; ++j) {
      for (int64_t d = 0; d < dim; ++d) k_t[d * kTileKeys + j] = k[(t * kTileKeys + j) * dim + d];
    }
    kernels().attention_forward({m, dim, visible.data(), 0.5f, q.data(), k_t.data(),
                                 v.data() + t * kTileKeys * dim, scores.data(), max.data(),
                                 sum.data(), out.data()});
  }
  for (int64_t i = 0; i < m; ++i) {
    std::vector<double> p;
    double total = 0;
    for (int64_t j = 0; j < std::min(seen(i), keys); ++j) {
      double score = 0;
      for (int64_t d = 0; d < dim; ++d) score += 0.5 * q[i * dim + d] * k[j * dim + d];
      p.push_back(std::exp(score));
      total += p.back();
    }
    EXPECT_NEAR(max[i] + std::log(sum[i]), std::log(total), tolerance::kOpForward * 4);
    for (int64_t d = 0; d < dim; ++d) {
      double want = 0;
      for (size_t j = 0; j < p.size(); ++j) want += p[j] / total * v[j * dim + d];
      EXPECT_NEAR(out[i * dim + d] / sum[i], want, tolerance::kOpForward);
    }
  }
}

TEST_P(SimdTest, SoftmaxStatsFoldInPieces) {
  for (const int64_t n : {1, 5, 64, 301}) {
    const auto x = Random(random_, n, 5);
    SoftmaxStats stats = {-INFINITY, 0, 0};
    for (int64_t i = 0; i < n; i += 37) {
      kernels().softmax_stats(x.data() + i, 0.7f, &stats, std::min<int64_t>(37, n - i));
    }
    double max = -INFINITY, sum = 0, weighted = 0;
    for (const float v : x) max = std::max(max, double{v} * 0.7f);
    for (const float v : x) {
      sum += std::exp(double{v} * 0.7f - max);
      weighted += std::exp(double{v} * 0.7f - max) * (double{v} * 0.7f - max);
    }
    EXPECT_NEAR(stats.sum / sum, 1, tolerance::kOpForward);
    EXPECT_NEAR(stats.weighted, weighted, tolerance::kOpForward * (1 - weighted));
  }
}

TEST_P(SimdTest, ReductionsMatchLoops) {
  for (const int64_t n : {0, 1, 3, 16, 67, 200}) {
    const auto x = Random(random_, n), y = Random(random_, n);
    double dot = 0, squares = 0;
    float max = -INFINITY;
    for (int64_t i = 0; i < n; ++i) {
      dot += double{x[i]} * y[i];
      squares += double{x[i]} * x[i];
      max = std::max(max, x[i]);
    }
    EXPECT_NEAR(kernels().dot(x.data(), y.data(), n), dot, tolerance::kOpForward * 20);
    EXPECT_NEAR(kernels().sum_squares(x.data(), n), squares, tolerance::kOpForward * squares);
    EXPECT_EQ(kernels().max(x.data(), n), max);
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, SimdTest, testing::ValuesIn(SupportedKernels()),
                         [](const auto& table) { return std::string(table.param->name); });

}  // namespace
}  // namespace coppice::cpu
