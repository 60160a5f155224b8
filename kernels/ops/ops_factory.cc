// CreateOps: the only place that knows which devices exist. Linked by binaries (target
// ops_factory), never by libraries.
#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/cpu/cpu_ops.h"
#include "kernels/ops/ops.h"
#include "kernels/ops/ops_factory_cuda.h"

namespace coppice::ops {

absl::StatusOr<std::unique_ptr<Ops>> CreateOps(absl::string_view device, int threads,
                                               bool deterministic, DType compute_dtype,
                                               const MatMulCacheFile& matmul_cache) {
  if (device == "cpu" && !matmul_cache.path.empty()) {
    LOG(WARNING) << "matmul_cache_unused file=" << matmul_cache.path << " note=\"it is for cuda\"";
  }
  if (device == "cpu") return cpu::CpuOps::Create(threads);
  if (device == "cuda") {
    return CreateCudaOps(deterministic, compute_dtype, /*portable=*/false, matmul_cache);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown device: want cpu or cuda, got \"", device, "\"; fix --device"));
}

}  // namespace coppice::ops
