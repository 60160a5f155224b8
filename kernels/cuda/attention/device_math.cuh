// Instructions that kernels on wgmma and kernels on mma.sync share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace coppice::cuda {

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace coppice::cuda
