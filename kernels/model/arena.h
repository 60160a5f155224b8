// Arena: lays tensors one after the other in one buffer, each at a 256-byte boundary. With a null
// base it only counts, so the same layout function answers "how many bytes" and "where". Owns
// nothing; any thread.
#pragma once

#include <cstdint>

#include "kernels/base/tensor_view.h"

namespace coppice {

class Arena {
 public:
  static constexpr int64_t kAlignment = 256;

  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  TensorView Vector(DType dtype, int64_t n) { return View1D(Take(n * SizeOf(dtype)), dtype, n); }
  TensorView Matrix(DType dtype, int64_t rows, int64_t cols) {
    return View2D(Take(rows * cols * SizeOf(dtype)), dtype, rows, cols);
  }
  int64_t size_bytes() const { return size_bytes_; }

 private:
  void* Take(int64_t bytes) {
    void* data = base_ == nullptr ? nullptr : base_ + size_bytes_;
    size_bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return data;
  }

  char* base_;
  int64_t size_bytes_ = 0;
};

}  // namespace coppice
