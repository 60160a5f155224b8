// TensorView: a non-owning, strided view of memory. Row-major, outermost dimension first, at most
// four dimensions, strides in elements. A POD header: safe to include from .cu files.
//
// A default-constructed view is "absent" (data == nullptr, rank == 0) and is how optional tensor
// parameters are left out.
#pragma once

#include <cstdint>

#include "kernels/base/dtype.h"

namespace coppice {

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int32_t rank = 0;
  int64_t shape[4] = {0, 0, 0, 0};
  int64_t stride[4] = {0, 0, 0, 0};

  bool present() const { return rank != 0; }
  int64_t dim(int i) const { return shape[i]; }
  int64_t num_elements() const {
    int64_t n = rank == 0 ? 0 : 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  int64_t num_bytes() const { return num_elements() * SizeOf(dtype); }  // of a contiguous view
  bool contiguous() const {
    int64_t expect = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expect) return false;
      expect *= shape[i];
    }
    return true;
  }

  // Typed start of the view. REQUIRES: T matches dtype.
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  float* f32() const { return static_cast<float*>(data); }
  int32_t* i32() const { return static_cast<int32_t*>(data); }

  // Rows [begin, end) of the outermost dimension.
  TensorView Rows(int64_t begin, int64_t end) const {
    TensorView v = *this;
    v.data = static_cast<char*>(data) + begin * stride[0] * SizeOf(dtype);
    v.shape[0] = end - begin;
    return v;
  }
  // Columns [begin, end) of the second dimension of a matrix; the result keeps the row stride.
  TensorView Cols(int64_t begin, int64_t end) const {
    TensorView v = *this;
    v.data = static_cast<char*>(data) + begin * stride[1] * SizeOf(dtype);
    v.shape[1] = end - begin;
    return v;
  }
  // [rows, heads * head_dim] -> [rows, heads, head_dim] over the same memory. REQUIRES: rank 2,
  // unit inner stride.
  TensorView SplitHeads(int64_t heads, int64_t head_dim) const {
    TensorView v = *this;
    v.rank = 3;
    v.shape[1] = heads;
    v.shape[2] = head_dim;
    v.stride[1] = head_dim;
    v.stride[2] = 1;
    return v;
  }
};

// Contiguous views over caller's memory.
inline TensorView View1D(void* data, DType t, int64_t n) {
  return {data, t, 1, {n, 0, 0, 0}, {1, 0, 0, 0}};
}
inline TensorView View2D(void* data, DType t, int64_t rows, int64_t cols) {
  return {data, t, 2, {rows, cols, 0, 0}, {cols, 1, 0, 0}};
}
inline TensorView View3D(void* data, DType t, int64_t a, int64_t b, int64_t c) {
  return {data, t, 3, {a, b, c, 0}, {b * c, c, 1, 0}};
}
inline TensorView View4D(void* data, DType t, int64_t a, int64_t b, int64_t c, int64_t d) {
  return {data, t, 4, {a, b, c, d}, {b * c * d, c * d, d, 1}};
}

}  // namespace coppice
