#include <gtest/gtest.h>

#include <bit>
#include <numeric>
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

struct Extras {
  bool bias, addend, in_place;
};

// One product with strided operands, against the reference.
void ExpectMatMul(ops::Ops& ops, std::mt19937_64& random, int64_t m, int64_t n, int64_t k,
                  bool trans_a, bool trans_b, Extras extras, double tolerance) {
  SCOPED_TRACE(testing::Message() << m << " x " << n << " x " << k << " trans " << trans_a
                                  << trans_b << " bias " << extras.bias << " addend "
                                  << extras.addend << extras.in_place);
  GuardedTensor a(trans_a ? std::vector{k, m} : std::vector{m, k}, 3);
  GuardedTensor b(trans_b ? std::vector{n, k} : std::vector{k, n}, 1);
  GuardedTensor c({m, n}, 5), bias({n}), addend({m, n}, 2);
  for (GuardedTensor* t : {&a, &b, &c, &bias, &addend}) t->FillNormal(random);
  Vector want = reference::MatMul(a.ToDouble(), b.ToDouble(), m, n, k, trans_a, trans_b);
  for (int64_t i = 0; i < m * n; ++i) {
    if (extras.bias) want[i] += bias[i % n];
    if (extras.addend) want[i] += extras.in_place ? c[i] : addend[i];
  }
  ops::MatMulParams p = {.a = a.view(), .b = b.view(), .trans_a = trans_a, .trans_b = trans_b};
  p.c = c.view();
  if (extras.bias) p.bias = bias.view();
  if (extras.addend) p.addend = extras.in_place ? c.view() : addend.view();
  const absl::Status status = ops.MatMul(p);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_LT(RelativeError(c, want), tolerance);
  c.ExpectGuardsIntact("c");
}

constexpr Extras kAllExtras[] = {{false, false, false}, {true, false, false}, {false, true, false},
                                 {false, true, true},   {true, true, false},  {true, true, true}};

class MatMulDeviceTest : public DeviceTest {
 protected:
  double Tolerance(const Extras& extras) const {
    return extras.bias ? bias_tolerance() : forward_tolerance();
  }
};
INSTANTIATE_TEST_SUITE_P(Devices, MatMulDeviceTest, testing::ValuesIn(kDevices));

// A weight gradient: the product, then added to itself. cuBLASLt has none of f16.
TEST_P(MatMulDeviceTest, SumsWeightGradientsInBf16UnlessItComputesInF16) {
  std::mt19937_64 random(6);
  for (const auto& [m, n, k] : {std::tuple{8, 16, 3}, {64, 40, 130}, {130, 72, 33}}) {
    GuardedTensor d_y({k, m}, 8), x({k, n}, 8);
    d_y.FillNormal(random);
    x.FillNormal(random);
    const Vector want = reference::MatMul(d_y.ToDouble(), x.ToDouble(), m, n, k, true, false);
    std::vector<uint16_t> bits(m * n);
    ops::MatMulParams p = {.a = d_y.view(), .b = x.view(), .trans_a = true};
    p.c = View2D(bits.data(), DType::kBF16, m, n);
    for (const double times : {1.0, 2.0, 3.0}) {
      const absl::Status status = ops_->MatMul(p);
      if (ops_->Info().compute_dtype == DType::kF16) {
        EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
        break;
      }
      ASSERT_TRUE(status.ok()) << status;
      GuardedTensor got({m, n});
      Vector sum = want;
      for (int64_t i = 0; i < got.size(); ++i) {
        got[i] = std::bit_cast<float>(uint32_t{bits[i]} << 16);
        sum[i] *= times;
      }
      EXPECT_LT(RelativeError(got, sum), times / 256) << m << " x " << n;
      p.addend = p.c;
    }
  }
}

TEST_P(MatMulDeviceTest, MatchesReferenceForEveryTransposeAndExtra) {
  std::mt19937_64 random(1);
  for (const int64_t m : Share(Scaled<std::vector<int64_t>>({0, 1, 2, 7, 33}, {0, 1, 33}))) {
    for (const auto& [n, k] : {std::pair{1, 1}, {5, 0}, {0, 5}, {17, 31}, {64, 64}, {130, 65}}) {
      for (const Extras& extras : kAllExtras) {
        if (on_cuda() && k == 0) continue;  // refused there: no product has it
        for (const bool trans_a : {false, true}) {
          for (const bool trans_b : {false, true}) {
            ExpectMatMul(*ops_, random, m, n, k, trans_a, trans_b, extras, Tolerance(extras));
          }
        }
      }
    }
  }
}

// Decode: few rows against weights [n, k], where another algorithm takes over.
TEST_P(MatMulDeviceTest, MatchesReferenceForFewRows) {
  std::mt19937_64 random(2);
  std::vector<int64_t> all_rows(40);
  std::iota(all_rows.begin(), all_rows.end(), 1);
  for (const int64_t m : Share(Scaled(all_rows, {1, 8, 9, 16, 17, 40}))) {
    for (const auto& [n, k] : {std::pair{192, 576}, {77, 129}, {3, 1000}}) {
      ExpectMatMul(*ops_, random, m, n, k, false, true, kAllExtras[m % 6],
                   Tolerance(kAllExtras[m % 6]));
    }
  }
}

// x W^T, the product of every forward pass: a row gets the same bits whatever the other rows and
// the number of threads. A decoded token then cannot depend on its batch, nor a prompt on how it
// was cut into chunks.
TEST(MatMulTest, RowsDoNotDependOnTheirBatch) {
  std::mt19937_64 random(4);
  const int64_t rows = 150, n = 203;
  for (const int64_t k : {5, 64, 576, 1536, 1700}) {
    GuardedTensor a({rows, k}), b({n, k}), whole({rows, n});
    a.FillNormal(random);
    b.FillNormal(random);
    const auto product = [&](int threads, int64_t begin, int64_t end, GuardedTensor& c) {
      const auto ops = std::move(ops::CreateOps("cpu", threads)).value();
      ASSERT_TRUE(
          ops->MatMul(
                 {.a = a.view().Rows(begin, end), .b = b.view(), .trans_b = true, .c = c.view()})
              .ok());
    };
    product(2, 0, rows, whole);
    for (const auto& [begin, end] : {std::pair{0, 1}, {149, 150}, {3, 5}, {17, 24}, {50, 147}}) {
      for (const int threads : {1, 3}) {
        GuardedTensor part({end - begin, n});
        product(threads, begin, end, part);
        for (int64_t i = 0; i < part.size(); ++i) ASSERT_EQ(part[i], whole[begin * n + i]);
      }
    }
  }
}

TEST(MatMulTest, EqualInputsGiveEqualBits) {
  const auto ops = std::move(ops::CreateOps("cpu", 2)).value();
  std::mt19937_64 random(3);
  for (const int64_t m : {1, 8, 200}) {
    GuardedTensor a({m, 300}), b({500, 300}), c({m, 500});
    a.FillNormal(random);
    b.FillNormal(random);
    std::vector<float> first;
    for (int run = 0; run < 5; ++run) {
      ASSERT_TRUE(ops->MatMul({.a = a.view(), .b = b.view(), .trans_b = true, .c = c.view()}).ok());
      if (run == 0) first = c.ToFloat();
      EXPECT_EQ(c.ToFloat(), first);
    }
  }
}

}  // namespace
}  // namespace coppice
