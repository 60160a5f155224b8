// Thread block clusters: ranks, the cluster's barrier, stores into another block's shared memory.
#pragma once

#include "kernels/cuda/attention/hopper.cuh"

namespace coppice::cuda {

__device__ __forceinline__ int ClusterRank() {
  int rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int ClusterSize() {
  int size;
  asm("mov.u32 %0, %cluster_nctarank;" : "=r"(size));
  return size;
}

// The barrier of all threads of the cluster that have not ended; what they wrote before they
// arrived is visible after the wait.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// REQUIRES: a cluster of at least 2 blocks.
// Stores into the copy of `to` in block `rank` and counts the bytes at its copy of `full`, for
// which that block waits before it reads them or ends.
__device__ __forceinline__ void SendTo(int rank, int* to, int x, const Barrier& full) {
  asm volatile(
      "{\n.reg .b32 to, full;\nmapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 full, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %3, [full];\n}" ::"r"(
          SharedAddress(to)),
      "r"(SharedAddress(&full.word)), "r"(rank), "r"(x)
      : "memory");
}
__device__ __forceinline__ void SendTo(int rank, float* to, float x, const Barrier& full) {
  SendTo(rank, reinterpret_cast<int*>(to), __float_as_int(x), full);
}
__device__ __forceinline__ void SendTo(int rank, float4* to, const float4& x, const Barrier& full) {
  asm volatile(
      "{\n.reg .b32 to, full;\nmapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 full, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, "
      "[full];\n}" ::"r"(SharedAddress(to)),
      "r"(SharedAddress(&full.word)), "r"(rank), "r"(__float_as_int(x.x)), "r"(__float_as_int(x.y)),
      "r"(__float_as_int(x.z)), "r"(__float_as_int(x.w))
      : "memory");
}

}  // namespace coppice::cuda
