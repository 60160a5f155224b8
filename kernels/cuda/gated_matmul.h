// The gated MLP's products of many rows with SwiGLU as their epilogue, forward and backward: what
// SwiGLU reads never comes from memory again. A row's bits depend on neither its batch nor the
// launch, once there are rows enough that the op comes here.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/base/dtype.h"

namespace coppice::cuda {

// E: bf16 or f16.
//
// [gate | up] = x weight^T, both rounded to E;  act = silu(gate) * up
struct GatedMatMulArgs {
  const void* x = nullptr;  // [rows, k] E
  int64_t x_stride = 0;
  const void* weight = nullptr;  // [2 ffn, k] E
  int64_t weight_stride = 0;
  void* gate_up = nullptr;  // optional [rows, 2 ffn] E
  int64_t gate_up_stride = 0;
  void* act = nullptr;  // optional [rows, ffn] E
  int64_t act_stride = 0;
  int64_t rows = 0, ffn = 0, k = 0;
  int* counter = nullptr;      // scratch: who does what
  DType dtype = DType::kBF16;  // E
};
// d_act = d_y weight, in f32, and from it the gradient of gate and up
struct GatedBackwardArgs {
  const void* d_y = nullptr;  // [rows, k] E
  int64_t d_y_stride = 0;
  const void* weight = nullptr;  // [k, ffn] E
  int64_t weight_stride = 0;
  const void* gate_up = nullptr;  // [rows, 2 ffn] E
  int64_t gate_up_stride = 0;
  void* d_gate_up = nullptr;  // [rows, 2 ffn] E, may be gate_up
  int64_t d_gate_up_stride = 0;
  void* act = nullptr;  // [rows, ffn] E: SwiGLU's output again
  int64_t act_stride = 0;
  int64_t rows = 0, ffn = 0, k = 0;
  int* counter = nullptr;
  DType dtype = DType::kBF16;
};

// REQUIRES, of both: sm_90a; rows, ffn, k at least 1 and below 2^30; ffn, k and the strides
// multiples of 8; tensors on 16-byte boundaries.
cudaError_t LaunchGatedMatMul(const GatedMatMulArgs& args, cudaStream_t stream);
cudaError_t LaunchGatedBackward(const GatedBackwardArgs& args, cudaStream_t stream);

}  // namespace coppice::cuda
