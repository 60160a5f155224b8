// CreateCudaOps: defined by kernels/cuda when it is built, else by ops_factory_nocuda.cc. Used by
// CreateOps only.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/ops/ops.h"

namespace coppice::ops {

absl::StatusOr<std::unique_ptr<Ops>> CreateCudaOps(bool deterministic, DType compute_dtype);

}  // namespace coppice::ops
