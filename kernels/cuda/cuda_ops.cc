#include "kernels/cuda/cuda_ops.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/attention/tree_attention.h"
#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/timeline.h"
#include "kernels/ops/ops_factory_cuda.h"

namespace coppice {
namespace cuda {
namespace {

// The head's logits take up to 2.5 GiB, attention's backward what it is not lent; plans, the
// library and fragments get the rest.
constexpr int64_t kMaxScratchBytes = int64_t{7} << 29;

absl::Status CheckContiguous(absl::string_view op, const TensorView& t) {
  if (t.contiguous() && (t.data != nullptr || t.num_elements() == 0)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": want dense memory, got a strided or null view; copy it first"));
}

// Memory of plans comes from the stream's pool and stays there, up to so much.
constexpr uint64_t kPoolBytes = uint64_t{256} << 20;

absl::Status KeepPool(Context& context) {
  cudaMemPool_t pool = nullptr;
  RETURN_IF_ERROR(context.Check(cudaDeviceGetDefaultMemPool(&pool, 0), "memory pool"));
  uint64_t threshold = kPoolBytes;
  return context.Check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold),
                       "memory pool");
}

}  // namespace

absl::StatusOr<std::unique_ptr<ops::Ops>> CudaOps::Create(const CudaOptions& options) {
  if (options.compute_dtype != DType::kBF16 && options.compute_dtype != DType::kF16) {
    return absl::InvalidArgumentError(absl::StrCat(
        "cuda device refused: compute_dtype wants bf16 or f16, got ", Name(options.compute_dtype)));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Context> context, Context::Create(options));
  RETURN_IF_ERROR(KeepPool(*context));
  cudaDeviceProp properties = {};
  RETURN_IF_ERROR(context->Check(cudaGetDeviceProperties(&properties, 0), "device properties"));
  const bool stores_scores = context->compute_capability() == 90;
  std::unique_ptr<CudaOps> ops(new CudaOps(std::move(context)));
  ops->info_ = {
      .kind = DeviceKind::kCuda,
      .name = absl::StrCat("cuda ", properties.name, ", sm_", properties.major, properties.minor,
                           options.compute_dtype == DType::kF16 ? ", f16" : ""),
      .compute_dtype = options.compute_dtype,
      .residual_dtype = DType::kF32,
      .total_bytes = static_cast<int64_t>(properties.totalGlobalMem),
      .score_bytes = stores_scores ? kRoundScoresBytes : 0,
      .scores_head_dim = kStoredScoresHeadDim,
      .context_gradients = true};
  return ops;
}

ops::DeviceInfo CudaOps::Info() const {
  ops::DeviceInfo info = info_;
  size_t free_bytes = 0, total_bytes = 0;
  if (cudaMemGetInfo(&free_bytes, &total_bytes) == cudaSuccess)
    info.free_bytes = static_cast<int64_t>(free_bytes);
  info.op_scratch_bytes = std::max<int64_t>(0, kMaxScratchBytes - context_->scratch_bytes());
  return info;
}

absl::StatusOr<DeviceBuffer> CudaOps::Allocate(int64_t size_bytes, absl::string_view label) {
  if (size_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("allocate ", label, ": want bytes >= 0, got ", size_bytes, "; fix the size"));
  }
  const size_t rounded = (static_cast<size_t>(size_bytes) / 256 + 1) * 256;
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, rounded);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(
        absl::StrCat("out of device memory for ", label, ": want ", rounded, " bytes, have ",
                     Info().free_bytes, " free; lower the budget or use a larger device"));
  }
  RETURN_IF_ERROR(context_->Check(error, "malloc"));
  DeviceBuffer buffer(data, size_bytes, [](void* p) { cudaFree(p); });
  RETURN_IF_ERROR(context_->Check(cudaMemsetAsync(data, 0, rounded, context_->stream()), "memset"));
  return buffer;
}

absl::Status CudaOps::Upload(const void* host, TensorView dst) {
  RETURN_IF_ERROR(CheckContiguous("upload", dst));
  if (dst.num_bytes() == 0) return absl::OkStatus();
  return context_->Check(
      cudaMemcpyAsync(dst.data, host, dst.num_bytes(), cudaMemcpyHostToDevice, context_->stream()),
      "upload");
}

absl::Status CudaOps::Download(TensorView src, void* host) {
  RETURN_IF_ERROR(CheckContiguous("download", src));
  if (src.num_bytes() > 0) {
    RETURN_IF_ERROR(context_->Check(cudaMemcpyAsync(host, src.data, src.num_bytes(),
                                                    cudaMemcpyDeviceToHost, context_->stream()),
                                    "download"));
  }
  return context_->Synchronize();
}

absl::Status CudaOps::Zero(TensorView dst) {
  RETURN_IF_ERROR(CheckContiguous("zero", dst));
  if (dst.num_bytes() == 0) return absl::OkStatus();
  return context_->Check(cudaMemsetAsync(dst.data, 0, dst.num_bytes(), context_->stream()), "zero");
}

absl::Status CudaOps::Synchronize() { return context_->Synchronize(); }

absl::StatusOr<std::unique_ptr<ops::Timeline>> CudaOps::CreateTimeline() {
  return std::make_unique<CudaTimeline>(*context_);
}

absl::StatusOr<std::unique_ptr<ops::BatchPlan>> CudaOps::PlanBatch(const ops::TokenBatch& batch) {
  // Ids are bounded by the tensors that each op gets; here only the structure is known.
  constexpr int64_t kUnbounded = std::numeric_limits<int32_t>::max();
  RETURN_IF_ERROR(batch.Validate(kUnbounded, kUnbounded));
  return CudaBatchPlan::Create(*context_, batch);
}

absl::Status CudaOps::Copy(TensorView src, TensorView dst) {
  return cuda::Copy(*context_, src, dst);
}
absl::StatusOr<double> CudaOps::SumSquares(TensorView x) { return cuda::SumSquares(*context_, x); }
absl::Status CudaOps::Embedding(const ops::EmbeddingParams& p) {
  return cuda::Embedding(*context_, p);
}
absl::Status CudaOps::GatherRows(const ops::GatherRowsParams& p) {
  return cuda::GatherRows(*context_, p);
}
absl::Status CudaOps::RmsNorm(const ops::RmsNormParams& p) { return cuda::RmsNorm(*context_, p); }
absl::Status CudaOps::MatMul(const ops::MatMulParams& p) { return cuda::MatMul(*context_, p); }
absl::Status CudaOps::QkNormRope(const ops::QkNormRopeParams& p) {
  return cuda::QkNormRope(*context_, p);
}
absl::Status CudaOps::TreeAttention(const ops::TreeAttentionParams& p) {
  return cuda::TreeAttention(*context_, p);
}
absl::Status CudaOps::SwiGlu(const ops::SwiGluParams& p) { return cuda::SwiGlu(*context_, p); }
absl::Status CudaOps::LogProbHead(const ops::LogProbHeadParams& p) {
  return cuda::LogProbHead(*context_, p);
}
absl::Status CudaOps::NormMatMul(const ops::NormMatMulParams& p) {
  if (FitsSkinny(*context_, p)) return SkinnyNormMatMul(*context_, p);
  return Ops::NormMatMul(p);
}
absl::Status CudaOps::NormSwiGlu(const ops::NormSwiGluParams& p) {
  if (FitsSkinny(*context_, p)) return SkinnyNormSwiGlu(*context_, p);
  return Ops::NormSwiGlu(p);
}
absl::Status CudaOps::MatMulSwiGlu(const ops::MatMulSwiGluParams& p) {
  if (FitsGated(*context_, p)) return GatedMatMul(*context_, p);
  return Ops::MatMulSwiGlu(p);
}
absl::Status CudaOps::MlpBlock(const ops::MlpBlockParams& p) {
  if (FitsChain(*context_, p)) return LayerChain(*context_, p);
  return Ops::MlpBlock(p);
}
absl::Status CudaOps::EmbeddingBackward(const ops::EmbeddingBackwardParams& p) {
  return cuda::EmbeddingBackward(*context_, p);
}
absl::Status CudaOps::ScatterAddRows(const ops::ScatterAddRowsParams& p) {
  return cuda::ScatterAddRows(*context_, p);
}
absl::Status CudaOps::RmsNormBackward(const ops::RmsNormBackwardParams& p) {
  return cuda::RmsNormBackward(*context_, p);
}
absl::Status CudaOps::SumRows(const ops::SumRowsParams& p) { return cuda::SumRows(*context_, p); }
absl::Status CudaOps::QkNormRopeBackward(const ops::QkNormRopeBackwardParams& p) {
  return cuda::QkNormRopeBackward(*context_, p);
}
absl::Status CudaOps::TreeAttentionBackward(const ops::TreeAttentionBackwardParams& p) {
  return cuda::TreeAttentionBackward(*context_, p);
}
absl::Status CudaOps::SwiGluBackward(const ops::SwiGluBackwardParams& p) {
  return cuda::SwiGluBackward(*context_, p);
}
absl::Status CudaOps::MatMulSwiGluBackward(const ops::MatMulSwiGluBackwardParams& p) {
  if (FitsGated(*context_, p)) return GatedMatMulBackward(*context_, p);
  return Ops::MatMulSwiGluBackward(p);
}
absl::Status CudaOps::LogProbHeadBackward(const ops::LogProbHeadBackwardParams& p) {
  return cuda::LogProbHeadBackward(*context_, p);
}
absl::StatusOr<std::unique_ptr<ops::PendingSample>> CudaOps::StartSample(
    const ops::SampleParams& p) {
  return cuda::StartSample(*context_, p);
}
absl::Status CudaOps::CopyBlocks(const ops::CopyBlocksParams& p) {
  return cuda::CopyBlocks(*context_, p);
}
absl::Status CudaOps::AdamW(const ops::AdamWParams& p) { return cuda::AdamW(*context_, p); }

}  // namespace cuda

absl::StatusOr<std::unique_ptr<ops::Ops>> ops::CreateCudaOps(bool deterministic,
                                                             DType compute_dtype, bool portable,
                                                             const MatMulCacheFile& matmul_cache) {
  return cuda::CudaOps::Create({.deterministic = deterministic,
                                .compute_dtype = compute_dtype,
                                .matmul_cache = matmul_cache,
                                .portable = portable});
}

}  // namespace coppice
