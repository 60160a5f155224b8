// Products whose algorithm the clock has chosen, on a GPU: right as by the library's own choice,
// and equal to the bit in whatever reads the same file.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/ops/ops.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/staged_ops.h"
#include "tests/support/test_ops.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

struct Product {
  int64_t m, n, k;
  bool trans_a, trans_b, addend, in_place;
};
// Large enough to be timed.
constexpr Product kProducts[] = {{1100, 1536, 1280, false, true, false, false},
                                 {1100, 1536, 1280, false, true, true, false},
                                 {1100, 1280, 1536, false, false, false, false},
                                 {1536, 1280, 1100, true, false, false, false},
                                 {1536, 1280, 1100, true, false, true, true}};

class MatMulClockTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    GuardedTensor::normal_dtype = ComputeDType(GetParam());
    path_ = testing::TempDir() + "/matmul_clock_" + std::to_string(getpid()) + ".txt";
    std::filesystem::remove(path_);
    const auto probe = Open("");
    if (SkipsDevice(GetParam(), probe.status())) GTEST_SKIP() << probe.status();
    ASSERT_TRUE(probe.ok()) << probe.status();
  }
  void TearDown() override {
    GuardedTensor::normal_dtype = DType::kF32;
    std::filesystem::remove(path_);
  }

  absl::StatusOr<std::unique_ptr<ops::Ops>> Open(const std::string& path,
                                                 bool deterministic = false,
                                                 bool grows = true) const {
    return ops::CreateCudaOps(deterministic, ComputeDType(GetParam()), IsPortable(),
                              {.path = path, .grows = grows});
  }
  // Of every product, by a device of its own: a process would differ by nothing else.
  std::vector<std::vector<float>> Results(const std::string& path, bool deterministic = false,
                                          bool grows = true) {
    auto device = Open(path, deterministic, grows);
    EXPECT_TRUE(device.ok()) << device.status();
    if (!device.ok()) return {};
    StagedOps staged(*std::move(device));
    std::vector<std::vector<float>> results;
    for (const Product& product : kProducts) results.push_back(Run(staged, product));
    return results;
  }
  static std::vector<float> Run(ops::Ops& ops, const Product& s) {
    std::mt19937_64 random(11);
    GuardedTensor a(s.trans_a ? std::vector{s.k, s.m} : std::vector{s.m, s.k}, 8);
    GuardedTensor b(s.trans_b ? std::vector{s.n, s.k} : std::vector{s.k, s.n}, 8);
    GuardedTensor c({s.m, s.n}, 8), addend({s.m, s.n}, 8);
    for (GuardedTensor* t : {&a, &b, &c, &addend}) t->FillNormal(random);
    ops::MatMulParams p = {
        .a = a.view(), .b = b.view(), .trans_a = s.trans_a, .trans_b = s.trans_b, .c = c.view()};
    if (s.addend) p.addend = s.in_place ? c.view() : addend.view();
    const absl::Status status = ops.MatMul(p);
    EXPECT_TRUE(status.ok()) << status;
    c.ExpectGuardsIntact("c");
    return c.ToFloat();
  }
  std::string File() const {
    std::stringstream text;
    text << std::ifstream(path_).rdbuf();
    return text.str();
  }
  static double WorstGap(const std::vector<float>& got, const std::vector<float>& want) {
    double worst = 0, largest = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      largest = std::max<double>(largest, std::abs(want[i]));
      const double gap = std::abs(double{got[i]} - want[i]);
      worst = std::isnan(gap) ? INFINITY : std::max(worst, gap);
    }
    return worst / largest;
  }

  std::string path_;
};
INSTANTIATE_TEST_SUITE_P(Devices, MatMulClockTest, testing::ValuesIn(kCudaDevices));

TEST_P(MatMulClockTest, AgreesWithTheCpu) {
  const auto cpu = std::move(ops::CreateOps("cpu")).value();
  const auto results = Results(path_);
  ASSERT_EQ(results.size(), std::size(kProducts));
  for (size_t i = 0; i < results.size(); ++i) {
    EXPECT_LT(WorstGap(results[i], Run(*cpu, kProducts[i])), ComputeDType(GetParam()) == DType::kF16
                                                                 ? tolerance::kF16Forward
                                                                 : tolerance::kBf16Forward)
        << "product " << i;
  }
}

TEST_P(MatMulClockTest, KeepsEachKindOnceAndGivesEqualBitsToWhoeverReadsIt) {
  const auto first = Results(path_);
  const std::string file = File();
  // A header of two lines, a line a product, the end.
  EXPECT_EQ(std::count(file.begin(), file.end(), '\n'), 2 + std::ssize(kProducts) + 1) << file;
  EXPECT_EQ(file.find("first_us=0.00"), std::string::npos) << "not timed: " << file;
  EXPECT_EQ(Results(path_), first);
  EXPECT_EQ(Results(path_, /*deterministic=*/false, /*grows=*/false), first);
  EXPECT_EQ(File(), file);
}

TEST_P(MatMulClockTest, LeavesDeterministicModeAlone) {
  EXPECT_EQ(Results(path_, /*deterministic=*/true), Results("", /*deterministic=*/true));
  EXPECT_FALSE(std::filesystem::exists(path_));
}

TEST_P(MatMulClockTest, RefusesAFileThatItCannotMake) {
  EXPECT_EQ(Open("/absent/choices.txt").status().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace coppice
