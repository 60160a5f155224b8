// Copies between tensors by the copy engine where it can, by kernels otherwise; and whole KV
// blocks.
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

bool IsFloat(DType t) { return t == DType::kF32 || t == DType::kBF16 || t == DType::kF16; }

absl::Status CheckCopy(const TensorView& src, const TensorView& dst) {
  bool same = src.rank == dst.rank && src.present();
  for (int i = 0; same && i < src.rank; ++i) same = src.shape[i] == dst.shape[i];
  if (!same) {
    return absl::InvalidArgumentError(
        "copy: tensor dst: want the shape of src, got another; pass equal shapes");
  }
  if (src.dtype != dst.dtype && !(IsFloat(src.dtype) && IsFloat(dst.dtype))) {
    return absl::UnimplementedError(
        absl::StrCat("copy: want equal types or two of f32, bf16, f16, got ", Name(src.dtype),
                     " to ", Name(dst.dtype), "; convert on the host"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Copy(Context& context, TensorView src, TensorView dst) {
  RETURN_IF_ERROR(CheckCopy(src, dst));
  if (src.num_elements() == 0) return absl::OkStatus();
  const bool dense = src.contiguous() && dst.contiguous();
  if (!dense && (src.rank != 2 || (src.dim(1) > 1 && (src.stride[1] != 1 || dst.stride[1] != 1)))) {
    return absl::InvalidArgumentError(
        "copy: want dense tensors or matrices with unit inner stride, got other strides; copy by "
        "rows");
  }
  if (dense && src.dtype == dst.dtype) {
    return context.Check(cudaMemcpyAsync(dst.data, src.data, src.num_bytes(),
                                         cudaMemcpyDeviceToDevice, context.stream()),
                         "copy");
  }
  if (dense) {  // one long row
    src = View2D(src.data, src.dtype, 1, src.num_elements());
    dst = View2D(dst.data, dst.dtype, 1, dst.num_elements());
  }
  return context.Check(LaunchCopy(src, dst, context.stream()), "copy");
}

absl::Status CopyBlocks(Context& context, const ops::CopyBlocksParams& p) {
  const TensorView& pool = p.pool;
  ops::ShapeCheck check("copy_blocks");
  check.Rank("pool", pool, 4);
  check.Dense("pool", pool, pool.dtype, {pool.dim(0), pool.dim(1), pool.dim(2), pool.dim(3)});
  for (int64_t i = 0; i < p.n; ++i) {
    for (const int32_t block : {p.src[i], p.dst[i]}) {
      check.That(block >= 0 && block < pool.dim(1), "block id",
                 absl::StrCat("[0, ", pool.dim(1), ")"), block);
    }
  }
  RETURN_IF_ERROR(check.status());
  for (int64_t begin = 0; begin < p.n; begin += BlockPairs::kMax) {
    const int64_t n = std::min<int64_t>(BlockPairs::kMax, p.n - begin);
    BlockPairs pairs = {};
    std::copy_n(p.src + begin, n, pairs.src);
    std::copy_n(p.dst + begin, n, pairs.dst);
    RETURN_IF_ERROR(context.Check(
        LaunchCopyBlocks(pool, pairs, static_cast<int>(n), context.stream()), "copy_blocks"));
  }
  return absl::OkStatus();
}

}  // namespace coppice::cuda
