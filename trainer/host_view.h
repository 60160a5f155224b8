// Views over host vectors, for the ops parameters that live in host memory.
#pragma once

#include <vector>

#include "kernels/base/tensor_view.h"

namespace coppice {

inline TensorView HostView(std::vector<float>& v) {
  return View1D(v.data(), DType::kF32, static_cast<int64_t>(v.size()));
}
// Read-only by contract of the op.
inline TensorView HostView(const std::vector<float>& v) {
  return View1D(const_cast<float*>(v.data()), DType::kF32, static_cast<int64_t>(v.size()));
}
inline TensorView HostView(const std::vector<int32_t>& v) {
  return View1D(const_cast<int32_t*>(v.data()), DType::kI32, static_cast<int64_t>(v.size()));
}

}  // namespace coppice
