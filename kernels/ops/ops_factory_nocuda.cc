#include "kernels/ops/ops_factory_cuda.h"

namespace coppice::ops {

absl::StatusOr<std::unique_ptr<Ops>> CreateCudaOps(bool, DType, bool, const MatMulCacheFile&) {
  return absl::UnimplementedError(
      "device cuda is not in this binary: want a build with CUDA, got one for cpu only; configure "
      "with -DCOPPICE_CUDA=ON");
}

}  // namespace coppice::ops
