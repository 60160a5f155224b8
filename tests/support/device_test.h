// DeviceTest: a test of ops that runs on every backend, over tensors in host memory. Instantiate
// with
//   INSTANTIATE_TEST_SUITE_P(Devices, MyTest, testing::ValuesIn(kDevices));
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <utility>

#include "kernels/ops/ops.h"
#include "tests/support/guarded_tensor.h"
#include "tests/support/staged_ops.h"
#include "tests/support/test_ops.h"
#include "tests/support/tolerances.h"

namespace coppice {

class DeviceTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    GuardedTensor::normal_dtype = ComputeDType(GetParam());
    auto ops = CreateTestOps(GetParam(), 2);
    if (SkipsDevice(GetParam(), ops.status())) GTEST_SKIP() << ops.status();
    ASSERT_TRUE(ops.ok()) << ops.status();
    ops_ = std::move(ops).value();
    if (!on_cuda()) return;
    auto staged = std::make_unique<StagedOps>(std::move(ops_));
    staged_ = staged.get();
    ops_ = std::move(staged);
  }
  void TearDown() override { GuardedTensor::normal_dtype = DType::kF32; }

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
  bool on_cuda() const { return OnCuda(GetParam()); }
  double forward_tolerance() const {
    return ByType(tolerance::kOpForward, tolerance::kBf16Forward, tolerance::kF16Forward);
  }
  double bias_tolerance() const {  // of a product with one
    return ByType(tolerance::kOpForward, tolerance::kBf16Bias, tolerance::kF16Bias);
  }
  double backward_tolerance() const {
    return ByType(tolerance::kOpBackward, tolerance::kBf16Backward, tolerance::kF16Backward);
  }

  std::unique_ptr<ops::Ops> ops_;

 private:
  static double ByType(double f32, double bf16, double f16) {
    const DType dtype = ComputeDType(GetParam());
    return dtype == DType::kF32 ? f32 : dtype == DType::kBF16 ? bf16 : f16;
  }

  StagedOps* staged_ = nullptr;  // ops_, on a device
};

}  // namespace coppice
