// NarrowOps: the CPU, claiming to compute in a 16-bit type. Enough for what moves weights: loading,
// converting, checkpoints; not for running a model.
#pragma once

#include "tests/support/failing_ops.h"

namespace coppice {

class NarrowOps final : public FailingOps {
 public:
  explicit NarrowOps(DType dtype) : FailingOps(*ops::CreateOps("cpu", 1)), dtype_(dtype) {}

  ops::DeviceInfo Info() const override {
    ops::DeviceInfo info = FailingOps::Info();
    info.compute_dtype = dtype_;
    return info;
  }

 private:
  const DType dtype_;
};

}  // namespace coppice
