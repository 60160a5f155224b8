// Thread block clusters: ranks, the cluster's barrier, arrivals at another block's barriers, stores
// and copies into its shared memory.
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

// Until every thread of the cluster came here.
__device__ __forceinline__ void ClusterSync() {
  __syncwarp();
  ClusterArrive();
  ClusterWait();
}

// Counts this thread's arrival at block `rank`'s copy of a barrier. What that block may overwrite
// then, the tensor cores have read, and what was stored there before was fenced for them and read
// by them: so nothing is left to be ordered; release.cluster would put a fence of the whole device
// here.
__device__ __forceinline__ void ArriveAt(Barrier& barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [at];\n}" ::"r"(SharedAddress(&barrier.word)),
      "r"(rank)
      : "memory");
}

// LoadBox into both blocks of a cluster of two, each told by its own barrier.
__device__ __forceinline__ void LoadBoxForBoth(void* to, const CUtensorMap& map, int column,
                                               int head, int row, Barrier& full) {
  constexpr uint16_t kBoth = 3;
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(head), "r"(row), "r"(SharedAddress(&full.word)), "h"(kBoth)
      : "memory");
}

// Waits for SendTo, and returns what it brought.
__device__ __forceinline__ int Receive(const int& from, Barrier& full, uint32_t parity) {
  int value;
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
      "@!done bra again;\n"
      "ld.shared.b32 %0, [%3];\n}"
      : "=r"(value)
      : "r"(SharedAddress(&full.word)), "r"(parity), "r"(SharedAddress(&from))
      : "memory");
  return value;
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
