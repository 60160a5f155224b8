// Sampling where blocks go in clusters (sm_90): eight blocks a row, each with its slice in shared
// memory.
#include <cooperative_groups.h>

#include "kernels/cuda/sampling_kernel.cuh"

namespace coppice::cuda {
namespace {

struct Cluster {
  static constexpr int kBlocks = 8;
  cooperative_groups::cluster_group group = cooperative_groups::this_cluster();

  __device__ int Rank() const { return static_cast<int>(group.block_rank()); }
  __device__ void Sync() const {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
  }
  template <typename T>
  __device__ T* At(T* p, int rank) const {
    return group.map_shared_rank(p, rank);
  }
};

}  // namespace

cudaError_t LaunchSample(const SampleInputs& in, cudaStream_t stream) {
  constexpr int64_t kMostBytes = 200 << 10;
  if (in.n == 0) return cudaSuccess;
  const int64_t slice_bytes =
      kWarps * RunOf<Cluster>(in.vocab) * static_cast<int64_t>(sizeof(float));
  const bool stages = slice_bytes <= kMostBytes;
  if (const cudaError_t e =
          cudaFuncSetAttribute(SampleKernel<Cluster>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(kMostBytes)))
    return e;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Cluster::kBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(Cluster::kBlocks * in.n));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = stages ? static_cast<size_t>(slice_bytes) : 0;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, SampleKernel<Cluster>, in, stages);
}

}  // namespace coppice::cuda
