// The 16-bit types that a device computes in, and what differs between them: bf16 has the range of
// f32 and 8 bits of significance, f16 has 11 bits up to 65,504. Kernels take one as template
// parameter E; tensors bring it as dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/base/dtype.h"

namespace coppice::cuda {

using Bf16 = __nv_bfloat16;
using F16 = __half;

template <typename E>
inline constexpr bool kIsF16 = std::is_same_v<E, F16>;

// Host: run(Bf16{}) or run(F16{}) as `dtype` says: launchers choose their kernels by it.
template <typename Run>
auto ForElement(DType dtype, const Run& run) {
  return dtype == DType::kF16 ? run(F16{}) : run(Bf16{});
}

// Two neighbours in a word, each rounded to nearest; beyond 65,504 f16 has infinity.
template <typename E>
__device__ __forceinline__ uint32_t PackPair(float low, float high) {
  static_assert(std::is_same_v<E, Bf16> || kIsF16<E>);
  uint32_t word;
  if constexpr (kIsF16<E>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}
// The two of a word.
template <typename E>
__device__ __forceinline__ float2 Pair(uint32_t word) {
  static_assert(std::is_same_v<E, Bf16> || kIsF16<E>);
  if constexpr (kIsF16<E>) {
    __half2 pair;
    memcpy(&pair, &word, sizeof(word));
    return __half22float2(pair);
  } else {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  }
}

}  // namespace coppice::cuda
