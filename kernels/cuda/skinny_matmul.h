// Products of few rows with weights, as decoding needs them: bound by reading the weights once.
//
//   c = x W^T (+ bias) (+ addend)       c = silu(gate) up,  [gate | up] = x W^T
//
// either with RmsNorm(x) in place of x. Deterministic: the order of sums follows from the shapes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/base/dtype.h"

namespace coppice::cuda {

constexpr int64_t kMaxSkinnyRows = 64;
constexpr int64_t kMaxSkinnyNormedRows = 4;  // more are faster normed by a kernel of their own

// E is what `dtype` says.
struct SkinnyArgs {
  const void* x = nullptr;  // [rows, k] E; f32 where it is normed
  int64_t x_stride = 0;
  const void* norm = nullptr;  // optional [k] E: x is normed with this weight
  float eps = 0;
  const void* w = nullptr;  // [n, k] E
  int64_t w_stride = 0;
  bool w_is_parameter = false;   // no kernel since the last ordinary launch wrote it
  DType dtype = DType::kBF16;    // or kF16
  bool swiglu = false;           // W is [gate | up] and c has n / 2 columns; no bias, no addend
  const void* bias = nullptr;    // optional [n] E
  const void* addend = nullptr;  // optional [rows, n], type of c; may be c
  int64_t addend_stride = 0;
  void* c = nullptr;  // [rows, n] E or f32
  int64_t c_stride = 0;
  bool c_is_f32 = false;
  int64_t rows = 0, n = 0, k = 0;
};

// REQUIRES: 1 <= rows <= kMaxSkinnyRows (with a norm kMaxSkinnyNormedRows); k, x_stride and
// w_stride multiples of 8; n (n / 2 with swiglu), c_stride and addend_stride even; x, w and norm on
// 16-byte boundaries, bias, addend and c on those of two elements.
cudaError_t LaunchSkinnyMatMul(const SkinnyArgs& args, cudaStream_t stream);

}  // namespace coppice::cuda
