// Programmatic dependent launch: a kernel starts while the one before it in the stream still runs,
// fetches what does not depend on it, and waits before it touches anything else.
//
// Rules that keep a chain of such kernels correct:
//   - every block executes WaitForPredecessor before it ends: when a kernel's wait is over, all
//     kernels before it have ended, not only its neighbour;
//   - before the wait a kernel reads only what was written before the chain began (weights, plans,
//     keys and values of earlier batches) and writes nothing;
//   - a chain begins with an ordinary launch, which waits for everything before it.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace coppice::cuda {

// The next kernel may start once every block of this one has come here.
__device__ __forceinline__ void LetSuccessorStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until the kernels before this one have ended and their writes are visible.
__device__ __forceinline__ void WaitForPredecessor() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Once per kernel and device: its shared memory, and one division of every multiprocessor's memory,
// without which kernels cannot run on it side by side.
inline cudaError_t PrepareOverlap(const void* kernel, int shared_bytes,
                                  std::atomic<uint64_t>& devices) {
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  const uint64_t bit = uint64_t{1} << device;
  if ((devices.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  if (const cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return e;
  if (const cudaError_t e = cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))
    return e;
  devices.fetch_or(bit, std::memory_order_relaxed);
  return cudaSuccess;
}

struct OverlappedGrid {
  dim3 blocks;
  int threads = 0;
  int shared_bytes = 0;    // the same at every launch of a kernel
  int cluster_blocks = 1;  // of the grid's first dimension
};

template <auto kKernel, typename... Arguments>
cudaError_t LaunchOverlapped(const OverlappedGrid& grid, cudaStream_t stream,
                             const Arguments&... arguments) {
  static std::atomic<uint64_t> devices = 0;
  if (const cudaError_t e =
          PrepareOverlap(reinterpret_cast<const void*>(kKernel), grid.shared_bytes, devices))
    return e;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(grid.cluster_blocks);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = grid.cluster_blocks > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

}  // namespace coppice::cuda
