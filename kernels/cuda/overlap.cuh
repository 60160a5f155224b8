// Programmatic dependent launch: a kernel starts while the one before it in the stream still runs,
// fetches what does not depend on it, and waits before it touches anything else.
//
// Rules that keep a chain of such kernels correct:
//   - every block executes WaitForPredecessor before it ends: when a kernel's wait is over, all
//     kernels before it have ended, not only its neighbour;
//   - before the wait a kernel reads only what was written before the chain began (weights, plans,
//     keys and values of earlier batches) and writes nothing;
//   - a chain begins with an ordinary launch, which waits for everything before it.
// Code for devices before sm_90 lacks all of it: its kernels go one after the other.
#pragma once

#include <cuda_runtime.h>

#include <nv/target>

#include <atomic>
#include <cstdint>

namespace coppice::cuda {

// The next kernel may start once every block of this one has come here.
__device__ __forceinline__ void LetSuccessorStart() {
  NV_IF_TARGET(NV_PROVIDES_SM_90, (asm volatile("griddepcontrol.launch_dependents;" ::: "memory");))
}

// Until the kernels before this one have ended and their writes are visible.
__device__ __forceinline__ void WaitForPredecessor() {
  NV_IF_TARGET(NV_PROVIDES_SM_90, (asm volatile("griddepcontrol.wait;" ::: "memory");))
}

// Devices, one bit each, on which a kernel is prepared, and those for which its code waits.
struct OverlapDevices {
  std::atomic<uint64_t> prepared = 0, waits = 0;
};

// Once per kernel and device: its shared memory, and one division of every multiprocessor's memory,
// without which kernels cannot run on it side by side.
inline cudaError_t PrepareOverlap(const void* kernel, int shared_bytes, OverlapDevices& devices,
                                  bool& waits) {
  int device = 0;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  const uint64_t bit = uint64_t{1} << device;
  if ((devices.prepared.load(std::memory_order_acquire) & bit) != 0) {
    waits = (devices.waits.load(std::memory_order_relaxed) & bit) != 0;
    return cudaSuccess;
  }
  if (const cudaError_t e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return e;
  if (const cudaError_t e = cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared))
    return e;
  // The code that this device runs may come from a build for an older one.
  cudaFuncAttributes attributes;
  if (const cudaError_t e = cudaFuncGetAttributes(&attributes, kernel)) return e;
  waits = attributes.ptxVersion >= 90;
  if (waits) devices.waits.fetch_or(bit, std::memory_order_relaxed);
  devices.prepared.fetch_or(bit, std::memory_order_release);
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
  static OverlapDevices devices;
  bool waits = false;
  if (const cudaError_t e =
          PrepareOverlap(reinterpret_cast<const void*>(kKernel), grid.shared_bytes, devices, waits))
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
  config.attrs = waits ? attributes : attributes + 1;
  config.numAttrs = (waits ? 1 : 0) + (grid.cluster_blocks > 1 ? 1 : 0);
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

}  // namespace coppice::cuda
