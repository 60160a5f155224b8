// Copies between tensors: strided matrices, conversion between float types, and whole KV blocks.
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

bool IsFloat(DType t) { return t == DType::kF32 || t == DType::kBF16 || t == DType::kF16; }

float ReadFloat(const void* p, DType t, int64_t i) {
  if (t == DType::kF32) return static_cast<const float*>(p)[i];
  return FloatFrom16(t, static_cast<const uint16_t*>(p)[i]);
}

void WriteFloat(void* p, DType t, int64_t i, float value) {
  if (t == DType::kF32) {
    static_cast<float*>(p)[i] = value;
  } else {
    static_cast<uint16_t*>(p)[i] = Bits16FromFloat(t, value);
  }
}

void CopyRun(const void* src, DType src_type, void* dst, DType dst_type, int64_t n) {
  if (src_type == dst_type) {
    std::memcpy(dst, src, n * SizeOf(src_type));
    return;
  }
  for (int64_t i = 0; i < n; ++i) WriteFloat(dst, dst_type, i, ReadFloat(src, src_type, i));
}

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
  if (src.contiguous() && dst.contiguous()) {  // one long row
    src = View2D(src.data, src.dtype, 1, src.num_elements());
    dst = View2D(dst.data, dst.dtype, 1, dst.num_elements());
  } else if (src.rank != 2 || src.stride[1] != 1 || dst.stride[1] != 1) {
    return absl::InvalidArgumentError(
        "copy: want dense tensors or matrices with unit inner stride, got other strides; copy by "
        "rows");
  }
  constexpr int64_t kGrain = int64_t{1} << 16;
  const int64_t cols = src.dim(1), pieces = (cols + kGrain - 1) / kGrain;
  ParallelRanges(context, src.dim(0) * pieces, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / pieces, col = i % pieces * kGrain;
      CopyRun(static_cast<const char*>(src.data) + (row * src.stride[0] + col) * SizeOf(src.dtype),
              src.dtype,
              static_cast<char*>(dst.data) + (row * dst.stride[0] + col) * SizeOf(dst.dtype),
              dst.dtype, std::min(kGrain, cols - col));
    }
  });
  return absl::OkStatus();
}

absl::Status CopyBlocks(Context& context, const ops::CopyBlocksParams& p) {
  constexpr absl::string_view kOp = "copy_blocks";
  const TensorView& pool = p.pool;
  RETURN_IF_ERROR(
      ops::ShapeCheck(kOp)
          .Rank("pool", pool, 4)
          .Dense("pool", pool, pool.dtype, {pool.dim(0), pool.dim(1), pool.dim(2), pool.dim(3)})
          .status());
  const int64_t num_blocks = pool.dim(1);
  for (int64_t i = 0; i < p.n; ++i) {
    for (const int32_t block : {p.src[i], p.dst[i]}) {
      if (block < 0 || block >= num_blocks) {
        return ops::ShapeCheck(kOp)
            .That(false, "block id", absl::StrCat("[0, ", num_blocks, ")"), block)
            .status();
      }
    }
  }
  const int64_t block_bytes = pool.dim(2) * pool.dim(3) * SizeOf(pool.dtype);
  ParallelRanges(context, pool.dim(0) * p.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* plane = static_cast<char*>(pool.data) + i / p.n * num_blocks * block_bytes;
      std::memcpy(plane + p.dst[i % p.n] * block_bytes, plane + p.src[i % p.n] * block_bytes,
                  block_bytes);
    }
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
