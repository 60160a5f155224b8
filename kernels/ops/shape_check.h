// ShapeCheck: want-versus-got checks of an op's tensors, shared by every implementation of Ops. The
// first mismatch wins:
//
//   RETURN_IF_ERROR(ShapeCheck("rms_norm").Tensor("x", p.x, DType::kF32, {rows, hidden}).status());
//   -> "rms_norm: tensor x: want f32 [4, 576], got f32 [4, 575]; pass a tensor of the wanted shape"
//
// A tensor also wants memory behind it (unless it is empty) and a unit stride in its last
// dimension. Thread: a value of the caller. Cost: no allocation unless something is wrong.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/base/tensor_view.h"

namespace coppice::ops {

class ShapeCheck {
 public:
  explicit ShapeCheck(absl::string_view op) : op_(op) {}

  ShapeCheck& Tensor(absl::string_view name, const TensorView& t, DType dtype,
                     std::initializer_list<int64_t> shape);
  // As Tensor, and dense: flat arenas and pages.
  ShapeCheck& Dense(absl::string_view name, const TensorView& t, DType dtype,
                    std::initializer_list<int64_t> shape);
  // As Tensor when present.
  ShapeCheck& Optional(absl::string_view name, const TensorView& t, DType dtype,
                       std::initializer_list<int64_t> shape);
  // The rank alone, before dimensions are read from `t`.
  ShapeCheck& Rank(absl::string_view name, const TensorView& t, int rank);
  // Any other condition: "<op>: <what>: want <want>, got <got>; ...".
  ShapeCheck& That(bool holds, absl::string_view what, absl::string_view want, int64_t got);

  const absl::Status& status() const { return status_; }

 private:
  absl::string_view op_;
  absl::Status status_;
};

}  // namespace coppice::ops
