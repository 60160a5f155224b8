// GuardedTensor: fp32 (or int32) memory for one tensor with known values around it and in the gaps
// between its rows, so that a test sees any write outside the view. Matrices and heads may have a
// row stride larger than the row.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "kernels/base/tensor_view.h"

namespace coppice {

class GuardedTensor {
 public:
  // Row-major [shape...] f32 with `row_gap` unused elements after each row of the outermost
  // dimension. Filled with zeros.
  explicit GuardedTensor(std::vector<int64_t> shape, int64_t row_gap = 0)
      : rows_(shape[0]), width_(1) {
    for (size_t i = 1; i < shape.size(); ++i) width_ *= shape[i];
    row_stride_ = width_ + row_gap;
    memory_.assign(kGuard + rows_ * row_stride_ + kGuard, kSentinel);
    view_.data = memory_.data() + kGuard;
    view_.rank = static_cast<int32_t>(shape.size());
    int64_t stride = 1;
    for (int i = view_.rank - 1; i >= 0; --i) {
      view_.shape[i] = shape[i];
      view_.stride[i] = i == 0 && view_.rank > 1 ? row_stride_ : stride;
      stride *= shape[i];
    }
    if (view_.rank == 1) row_stride_ = 1;
    Fill(0);
  }
  GuardedTensor(const GuardedTensor&) = delete;
  GuardedTensor& operator=(const GuardedTensor&) = delete;

  TensorView view() const { return view_; }
  int64_t size() const { return rows_ * width_; }

  // Element i in row-major order, gaps not counted.
  float& operator[](int64_t i) { return memory_[kGuard + i / width_ * row_stride_ + i % width_]; }
  float operator[](int64_t i) const { return const_cast<GuardedTensor&>(*this)[i]; }

  void Fill(float value) {
    for (int64_t i = 0; i < size(); ++i) (*this)[i] = value;
  }
  void FillNormal(std::mt19937_64& random, float deviation = 1) {
    std::normal_distribution<float> normal(0, deviation);
    for (int64_t i = 0; i < size(); ++i) {
      (*this)[i] = Held(normal(random));
    }
  }
  // What normals are cut to: the type that the device of the test computes in, so that device and
  // reference see the same inputs.
  inline static DType normal_dtype = DType::kF32;

  std::vector<double> ToDouble() const {
    std::vector<double> values(size());
    for (int64_t i = 0; i < size(); ++i) values[i] = (*this)[i];
    return values;
  }
  std::vector<float> ToFloat() const {
    std::vector<float> values(size());
    for (int64_t i = 0; i < size(); ++i) values[i] = (*this)[i];
    return values;
  }

  // Fails the test if anything outside the view has changed.
  void ExpectGuardsIntact(const char* name) const {
    std::vector<bool> inside(memory_.size(), false);
    for (int64_t i = 0; i < size(); ++i) {
      inside[kGuard + i / width_ * row_stride_ + i % width_] = true;
    }
    for (size_t i = 0; i < memory_.size(); ++i) {
      if (!inside[i]) {
        ASSERT_EQ(memory_[i], kSentinel)
            << name << " was overrun at offset " << static_cast<int64_t>(i) - kGuard;
      }
    }
  }

 private:
  static float Held(float x) {
    if (normal_dtype == DType::kF32) return x;
    const bool f16 = normal_dtype == DType::kF16;
    if (f16 && std::abs(x) < 0x1p-14f) return 0;  // where its steps stop shrinking
    return std::bit_cast<float>(std::bit_cast<uint32_t>(x) & (f16 ? 0xffffe000u : 0xffff0000u));
  }

  static constexpr int64_t kGuard = 64;
  static constexpr float kSentinel = -12345.5f;

  int64_t rows_, width_, row_stride_;
  std::vector<float> memory_;
  TensorView view_;
};

// Largest difference relative to the largest reference value (at least `floor`).
inline double RelativeError(const GuardedTensor& got, const std::vector<double>& want,
                            double floor = 1e-6) {
  double worst = 0, largest = floor;
  for (const double w : want) largest = std::max(largest, std::abs(w));
  for (size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(got[static_cast<int64_t>(i)] - want[i]);
    worst = std::isnan(error) ? INFINITY : std::max(worst, error);
  }
  return worst / largest;
}

}  // namespace coppice
