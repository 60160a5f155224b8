// DeviceTest: a test of ops that runs on every backend, over tensors in host memory. Instantiate
// with
//   INSTANTIATE_TEST_SUITE_P(Devices, MyTest, testing::ValuesIn(kDevices));
// Without a GPU the cuda instances are skipped, unless REQUIRE_CUDA=1 makes that a failure.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "kernels/ops/ops.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/staged_ops.h"
#include "tests/support/tolerances.h"

namespace coppice {

inline constexpr const char* kDevices[] = {"cpu", "cuda"};

class DeviceTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    GuardedTensor::normal_bits = on_cuda() ? GuardedTensor::kBf16Bits : GuardedTensor::kAllBits;
    auto ops = ops::CreateOps(GetParam(), 2);
    if (on_cuda() && !ops.ok() && std::getenv("REQUIRE_CUDA") == nullptr)
      GTEST_SKIP() << ops.status();
    ASSERT_TRUE(ops.ok()) << ops.status();
    ops_ = std::move(ops).value();
    if (!on_cuda()) return;
    auto staged = std::make_unique<StagedOps>(std::move(ops_));
    staged_ = staged.get();
    ops_ = std::move(staged);
  }
  void TearDown() override { GuardedTensor::normal_bits = GuardedTensor::kAllBits; }

  // Runs `test` for every type that an op takes where params.h says "f or r".
  template <typename Test>
  void ForComputeAndResidualType(const Test& test) {
    const ops::DeviceInfo info = ops_->Info();
    for (const DType dtype : {info.compute_dtype, info.residual_dtype}) {
      SCOPED_TRACE(Name(dtype));
      if (staged_ != nullptr) staged_->set_residual_dtype(dtype);
      test();
      if (info.compute_dtype == info.residual_dtype) return;
    }
  }
  bool on_cuda() const { return std::string(GetParam()) == "cuda"; }
  double forward_tolerance() const {
    return on_cuda() ? tolerance::kBf16Forward : tolerance::kOpForward;
  }
  double backward_tolerance() const {
    return on_cuda() ? tolerance::kBf16Backward : tolerance::kOpBackward;
  }

  std::unique_ptr<ops::Ops> ops_;

 private:
  StagedOps* staged_ = nullptr;  // ops_, on a device
};

}  // namespace coppice
