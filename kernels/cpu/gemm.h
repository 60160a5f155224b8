// C (+)= op(A) op(B) on raw row-major memory, for MatMul and for ops that contain products (the
// log-prob head).
#pragma once

#include <algorithm>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/tensor_view.h"
#include "kernels/cpu/context.h"

namespace coppice::cpu {

struct GemmArgs {
  bool trans_a = false;  // A is stored [k, m]
  bool trans_b = false;  // B is stored [n, k]
  int64_t m = 0, n = 0, k = 0;
  const float* a = nullptr;
  int64_t a_row = 0;  // elements from one stored row to the next
  const float* b = nullptr;
  int64_t b_row = 0;
  float* c = nullptr;  // [m, n]
  int64_t c_row = 0;
  bool accumulate = false;
};

// INTERNAL if oneDNN refuses.
absl::Status Gemm(Context& context, const GemmArgs& g);

// Row stride of a matrix, which BLAS wants to be at least its width even if there is one row.
inline int64_t LeadingDimension(const TensorView& t) {
  return t.dim(0) > 1 ? t.stride[0] : std::max<int64_t>(t.dim(1), 1);
}

}  // namespace coppice::cpu
