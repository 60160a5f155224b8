// SwiGLU of one element (Shazeer 2020), the same bits in all that include this.
//   act = gate s up with s = sigmoid(gate);
//   d_up = d gate s,  d_gate = d up s (1 + gate (1 - s)).
#pragma once

namespace coppice::cuda {

__device__ __forceinline__ float Sigmoid(float x) {
  float e, y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
  return y;
}
__device__ __forceinline__ float GatedUnit(float gate, float up) {
  return gate * Sigmoid(gate) * up;
}

struct GatedGradient {
  float gate, up, act;
};
__device__ __forceinline__ GatedGradient GatedUnitBackward(float gate, float up, float d) {
  const float s = Sigmoid(gate), silu = gate * s;
  return {d * up * (s * (1.0f + gate * (1.0f - s))), d * silu, silu * up};
}

}  // namespace coppice::cuda
