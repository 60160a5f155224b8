// What every CUDA op needs besides its tensors: one stream, cuBLASLt with its workspace, scratch
// memory that is kept between calls, and the first device error, which is final: kernels of a
// broken context cannot be trusted. Owned by CudaOps; used by one op at a time.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/dtype.h"
#include "kernels/cuda/layer_chain.h"
#include "kernels/cuda/pinned_memory.h"
#include "kernels/ops/ops.h"

namespace coppice::cuda {

class MatMulCache;

struct CudaOptions {
  // See ops::CreateOps.
  bool deterministic = false;
  DType compute_dtype = DType::kBF16;
  ops::MatMulCacheFile matmul_cache;
  // Without the kernels for sm_90 alone, whatever the device: for tests.
  bool portable = false;
};

// INTERNAL naming the call and CUDA's reason; OK for cudaSuccess.
absl::Status StatusOf(cudaError_t error, absl::string_view call);

// Work of one device. Decoding's kernels wait for all of their blocks (layer_chain.h, attention's
// stacked kernel), so a device serves one Context: two could each hold half of it for ever.
class Context {
 public:
  static constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;

  // UNAVAILABLE without a usable device, UNIMPLEMENTED on one for which this build has no kernels.
  // FAILED_PRECONDITION without the matmul cache's file.
  static absl::StatusOr<std::unique_ptr<Context>> Create(const CudaOptions& options);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  cudaStream_t stream() const { return stream_; }
  cublasLtHandle_t blas() const { return blas_; }
  void* workspace() const { return workspace_; }
  bool deterministic() const { return deterministic_; }
  DType compute_dtype() const { return compute_dtype_; }  // f of ops/params.h
  // Of the device, major * 10 + minor; the least that kernels want if the context is portable.
  int compute_capability() const { return compute_capability_; }
  int block_shared_bytes() const { return block_shared_bytes_; }          // that a block may have
  const LayerChainMemory& chain_memory() const { return chain_memory_; }  // null: no such kernel
  // What Scratch has given last: an op's while it runs.
  char* scratch() const { return scratch_; }
  int64_t scratch_bytes() const { return scratch_bytes_; }
  MatMulCache& matmuls() { return *matmuls_; }
  PinnedMemory& pinned() { return *pinned_; }

  // At least `size_bytes`, 256-byte aligned, contents undefined; work queued later may reuse it
  // after the next call. An op asks once and divides the memory itself. Grows, never shrinks.
  absl::StatusOr<char*> Scratch(int64_t size_bytes);

  // The status of `call`; the first error is remembered and returned from then on.
  absl::Status Check(cudaError_t error, absl::string_view call);
  absl::Status Synchronize();

 private:
  Context(bool deterministic, DType compute_dtype);
  absl::Status Init(const CudaOptions& options);
  absl::Status InitCapability(bool portable);
  absl::Status InitMatMuls(const ops::MatMulCacheFile& cache);
  absl::Status InitChainMemory();

  const bool deterministic_;
  const DType compute_dtype_;
  int compute_capability_ = 0, block_shared_bytes_ = 0;
  cudaStream_t stream_ = nullptr;
  cublasLtHandle_t blas_ = nullptr;
  void* workspace_ = nullptr;
  char* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
  LayerChainMemory chain_memory_;
  absl::Status failure_;
  std::unique_ptr<MatMulCache> matmuls_;
  std::unique_ptr<PinnedMemory> pinned_;
};

// Divides one scratch buffer: each piece starts at a 256-byte boundary. With a null base it only
// counts.
class ScratchCursor {
 public:
  explicit ScratchCursor(char* base) : base_(base) {}
  template <typename T>
  T* Take(int64_t n) {
    char* piece = base_ == nullptr ? nullptr : base_ + size_bytes_;
    size_bytes_ += (n * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(piece);
  }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  char* base_;
  int64_t size_bytes_ = 0;
};

}  // namespace coppice::cuda
