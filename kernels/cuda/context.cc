#include "kernels/cuda/context.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/matmul_cache.h"

namespace coppice::cuda {
namespace {

// What generation needs at its usual sizes, so that serving does not allocate.
constexpr int64_t kInitialScratchBytes = int64_t{256} << 20;

constexpr int kLeastCapability = 80;

}  // namespace

absl::Status StatusOf(cudaError_t error, absl::string_view call) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("cuda ", call, " failed: want cudaSuccess, got ",
                                          cudaGetErrorName(error), " (", cudaGetErrorString(error),
                                          "); restart the process"));
}

absl::StatusOr<std::unique_ptr<Context>> Context::Create(const CudaOptions& options) {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    return absl::UnavailableError(absl::StrCat("no cuda device: want at least 1, got ", devices,
                                               " (", cudaGetErrorString(error),
                                               "); check the driver or use --device=cpu"));
  }
  std::unique_ptr<Context> context(new Context(options.deterministic, options.compute_dtype));
  RETURN_IF_ERROR(context->Init(options));
  return context;
}

absl::Status Context::InitCapability(bool portable) {
  int major = 0, minor = 0;
  RETURN_IF_ERROR(
      Check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "attribute"));
  RETURN_IF_ERROR(
      Check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "attribute"));
  compute_capability_ = 10 * major + minor;
  if (compute_capability_ < kLeastCapability) {
    return absl::UnimplementedError(
        absl::StrCat("cuda device refused: want compute capability 8.0 or newer, got ", major, ".",
                     minor, "; use --device=cpu"));
  }
  const cudaError_t found = FindKernels();
  if (found == cudaErrorInvalidDeviceFunction || found == cudaErrorNoKernelImageForDevice) {
    cudaGetLastError();
    return absl::UnimplementedError(absl::StrCat(
        "cuda device refused: want kernels for compute capability ", major, ".", minor,
        ", got a build for others; configure with -DCMAKE_CUDA_ARCHITECTURES=", major, minor));
  }
  RETURN_IF_ERROR(Check(found, "find kernels"));
  if (portable) compute_capability_ = kLeastCapability;
  return Check(
      cudaDeviceGetAttribute(&block_shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0),
      "attribute");
}

absl::Status Context::Init(const CudaOptions& options) {
  RETURN_IF_ERROR(Check(cudaSetDevice(0), "set device"));
  RETURN_IF_ERROR(InitCapability(options.portable));
  RETURN_IF_ERROR(
      Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream create"));
  if (cublasLtCreate(&blas_) != CUBLAS_STATUS_SUCCESS) {
    return absl::InternalError("cublasLt create failed: want status 0; check the cuda libraries");
  }
  RETURN_IF_ERROR(Check(cudaMalloc(&workspace_, kWorkspaceBytes), "workspace"));
  RETURN_IF_ERROR(InitMatMuls(options.matmul_cache));
  pinned_ = std::make_unique<PinnedMemory>();
  if (compute_capability_ == 90 && !deterministic_) RETURN_IF_ERROR(InitChainMemory());
  return Scratch(kInitialScratchBytes).status();
}

absl::Status Context::InitMatMuls(const ops::MatMulCacheFile& cache) {
  std::unique_ptr<MatMulChoices> choices;
  if (!cache.path.empty() && deterministic_) {
    LOG(WARNING) << "matmul_cache_unused file=" << cache.path
                 << " note=\"with --deterministic one algorithm serves every number of rows\"";
  } else if (!cache.path.empty()) {
    cudaDeviceProp device = {};
    RETURN_IF_ERROR(Check(cudaGetDeviceProperties(&device, 0), "device properties"));
    ASSIGN_OR_RETURN(
        choices,
        MatMulChoices::Open(cache, absl::StrCat("cublaslt ", cublasLtGetVersion(), ", ",
                                                device.name, ", sm_", device.major, device.minor)));
  }
  matmuls_ = std::make_unique<MatMulCache>(std::move(choices));
  return absl::OkStatus();
}

absl::Status Context::InitChainMemory() {
  LayerChainMemory memory;
  RETURN_IF_ERROR(Check(CountChainBlocks(memory.blocks), "layer chain"));
  if (memory.blocks == 0) return absl::OkStatus();
  const int64_t size_bytes = LayerChainMemoryBytes(memory.blocks);
  RETURN_IF_ERROR(Check(cudaMalloc(&memory.data, size_bytes), "layer chain memory"));
  chain_memory_ = memory;
  return Check(InitLayerChainMemory(memory, stream_), "layer chain memory");
}

Context::Context(bool deterministic, DType compute_dtype)
    : deterministic_(deterministic), compute_dtype_(compute_dtype) {}

Context::~Context() {
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  matmuls_.reset();
  pinned_.reset();
  cudaFree(scratch_);
  cudaFree(workspace_);
  cudaFree(chain_memory_.data);
  if (blas_ != nullptr) cublasLtDestroy(blas_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

absl::StatusOr<char*> Context::Scratch(int64_t size_bytes) {
  if (size_bytes <= scratch_bytes_) return scratch_;
  const int64_t rounded = (size_bytes + (1 << 20) - 1) >> 20 << 20;
  RETURN_IF_ERROR(Synchronize());
  cudaFree(scratch_);
  scratch_ = nullptr;
  scratch_bytes_ = 0;
  const cudaError_t error = cudaMalloc(&scratch_, rounded);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(absl::StrCat("out of device memory for scratch: want ",
                                                     rounded, " bytes; lower --kv_bytes"));
  }
  RETURN_IF_ERROR(Check(error, "scratch"));
  scratch_bytes_ = rounded;
  return scratch_;
}

absl::Status Context::Check(cudaError_t error, absl::string_view call) {
  if (failure_.ok()) failure_ = StatusOf(error, call);
  return failure_;
}

absl::Status Context::Synchronize() { return Check(cudaStreamSynchronize(stream_), "synchronize"); }

}  // namespace coppice::cuda
