// What kernels share: vectors, conversions, and reductions whose order depends on the block's
// size alone.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "kernels/base/tensor_view.h"
#include "kernels/cuda/element.cuh"

namespace coppice::cuda {

// N elements that one instruction loads (16 bytes: 8 of 16 bits or 4 f32).
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T v[N];
};

template <typename T, int N>
__device__ inline Pack<T, N> Load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
// 16 bytes in one instruction: the compiler may split the assignment of a struct.
template <typename T, int N>
__device__ inline void Store(T* p, const Pack<T, N>& x) {
  if constexpr (sizeof(x) == 16) {
    uint4 words;
    memcpy(&words, &x, 16);
    __stwb(reinterpret_cast<uint4*>(p), words);
  } else {
    *reinterpret_cast<Pack<T, N>*>(p) = x;
  }
}

// Start of a row of the outermost dimension.
template <typename T>
__device__ inline T* RowOf(const TensorView& t, int64_t row) {
  return static_cast<T*>(t.data) + row * t.stride[0];
}

__device__ inline float ToFloat(float x) { return x; }
__device__ inline float ToFloat(Bf16 x) { return __bfloat162float(x); }
__device__ inline float ToFloat(F16 x) { return __half2float(x); }
template <typename T>
__device__ inline T FromFloat(float x);
template <>
__device__ inline float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ inline Bf16 FromFloat<Bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline F16 FromFloat<F16>(float x) {
  return __float2half_rn(x);
}

// N neighbours of a row, moved by accesses of at most 16 bytes each.
template <typename T, int N>
struct Strip {
  static constexpr int kWidest = 16 / static_cast<int>(sizeof(T));
  static constexpr int kPack = N < kWidest ? N : kWidest;
  Pack<T, kPack> packs[N / kPack];

  __device__ static Strip Read(const T* p) {
    Strip strip;
    for (int i = 0; i < N / kPack; ++i) strip.packs[i] = Load<T, kPack>(p + i * kPack);
    return strip;
  }
  __device__ void Write(T* p) const {
    for (int i = 0; i < N / kPack; ++i) Store<T, kPack>(p + i * kPack, packs[i]);
  }
  __device__ float operator[](int j) const { return ToFloat(packs[j / kPack].v[j % kPack]); }
  __device__ void Set(int j, float x) { packs[j / kPack].v[j % kPack] = FromFloat<T>(x); }
};

template <typename T>
__device__ inline T WarpSum(T x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Sum over the block, for every thread. REQUIRES: whole warps; `shared` [33] of the caller, free
// again after the next barrier.
template <typename T>
__device__ inline T BlockSum(T x, T* shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  x = WarpSum(x);
  __syncthreads();
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = WarpSum(lane < warps ? shared[lane] : T{0});
    if (lane == 0) shared[32] = x;
  }
  __syncthreads();
  return shared[32];
}

// Host: rows that 16-byte accesses may walk: aligned start and stride, width a multiple of the
// vector.
inline bool Aligned16(const TensorView& t) {
  const int64_t size = SizeOf(t.dtype);
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0) return false;
  for (int i = 0; i + 1 < t.rank; ++i) {
    if (t.stride[i] * size % 16 != 0) return false;
  }
  return t.rank == 0 || t.shape[t.rank - 1] * size % 16 == 0;
}

// Host: threads of a block that walks a row of `items`, whole warps, at most 512.
inline int RowThreads(int64_t items) {
  int64_t threads = (items + 31) / 32 * 32;
  while (threads > 512) threads = (threads / 2 + 31) / 32 * 32;
  return static_cast<int>(threads < 32 ? 32 : threads);
}

__host__ __device__ inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace coppice::cuda
