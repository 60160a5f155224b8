// Sampling on every architecture: a block has a row to itself, and reads it where it lies. A row of
// 152k logits stays in L2 over the dozen passes; one multiprocessor's share of that bounds them.
#include "kernels/cuda/sampling_kernel.cuh"

namespace coppice::cuda {
namespace {

struct Alone {
  static constexpr int kBlocks = 1;

  __device__ int Rank() const { return 0; }
  __device__ void Sync() const { __syncthreads(); }
  template <typename T>
  __device__ T* At(T* p, int /*rank*/) const {
    return p;
  }
};

}  // namespace

cudaError_t LaunchSampleAlone(const SampleInputs& in, cudaStream_t stream) {
  if (in.n == 0) return cudaSuccess;
  SampleKernel<Alone><<<static_cast<unsigned>(in.n), kThreads, 0, stream>>>(in, false);
  return cudaGetLastError();
}

}  // namespace coppice::cuda
