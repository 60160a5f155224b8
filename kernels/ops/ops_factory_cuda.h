// CreateCudaOps: defined by kernels/cuda when it is built, else by ops_factory_nocuda.cc. Used by
// CreateOps and tests only.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/ops/ops.h"

namespace coppice::ops {

// `portable`: without the kernels for one architecture alone, so that tests see what other devices
// run. Others: see CreateOps.
absl::StatusOr<std::unique_ptr<Ops>> CreateCudaOps(bool deterministic, DType compute_dtype,
                                                   bool portable = false,
                                                   const MatMulCacheFile& matmul_cache = {});

}  // namespace coppice::ops
