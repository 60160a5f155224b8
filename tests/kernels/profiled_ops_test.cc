#include "kernels/ops/profiled_ops.h"

#include <gtest/gtest.h>

#include <vector>

#include "tests/support/failing_ops.h"

namespace coppice::ops {
namespace {

std::unique_ptr<Ops> Cpu() { return CreateOps("cpu", 1).value(); }

TEST(ProfiledOpsTest, CountsCallsByFamilyAndAccountsForAllTime) {
  const auto ops = ProfiledOps::Create(Cpu()).value();
  std::vector<float> a(64 * 64, 1), b(64 * 64, 1), c(64 * 64);
  const MatMulParams product = {.a = View2D(a.data(), DType::kF32, 64, 64),
                                .b = View2D(b.data(), DType::kF32, 64, 64),
                                .c = View2D(c.data(), DType::kF32, 64, 64)};
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(ops->MatMul(product).ok());
  EXPECT_EQ(ops->SumSquares(View1D(a.data(), DType::kF32, 64)).value(), 64);

  const OpProfile profile = ops->Take().value();

  EXPECT_EQ(c[0], 64);
  double parts = profile.gap_seconds;
  for (int f = 0; f < kNumOpFamilies; ++f) {
    const OpProfile::Entry& entry = profile.families[f];
    const auto family = static_cast<OpFamily>(f);
    EXPECT_EQ(entry.calls, family == OpFamily::kMatMul         ? 3
                           : family == OpFamily::kGradientNorm ? 1
                                                               : 0)
        << Name(family);
    EXPECT_LE(entry.longest_seconds, entry.seconds);
    parts += entry.seconds;
  }
  EXPECT_DOUBLE_EQ(parts, profile.total_seconds);
}

TEST(ProfiledOpsTest, TakeForgets) {
  const auto ops = ProfiledOps::Create(Cpu()).value();
  std::vector<float> x(8);
  ASSERT_TRUE(ops->Zero(View1D(x.data(), DType::kF32, 8)).ok());
  ASSERT_TRUE(ops->Take().ok());

  const OpProfile empty = ops->Take().value();

  EXPECT_EQ(empty.families[static_cast<int>(OpFamily::kMemory)].calls, 0);
  EXPECT_EQ(empty.total_seconds, 0);
}

TEST(ProfiledOpsTest, PassesOnWhatTheDeviceAnswers) {
  auto failing = std::make_unique<FailingOps>(Cpu());
  failing->FailUploadsAfter(0);
  const auto ops = ProfiledOps::Create(std::move(failing)).value();
  std::vector<float> x(8);
  EXPECT_EQ(ops->Upload(x.data(), View1D(x.data(), DType::kF32, 8)).code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(ops->RmsNorm({}).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace coppice::ops
