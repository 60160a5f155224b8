#include "kernels/ops/shape_check.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/span.h"

namespace coppice::ops {
namespace {

std::string Describe(DType dtype, absl::Span<const int64_t> shape) {
  return absl::StrCat(Name(dtype), " [", absl::StrJoin(shape, ", "), "]");
}

std::string Describe(const TensorView& t) {
  if (!t.present()) return "no tensor";
  return Describe(t.dtype, absl::MakeConstSpan(t.shape, t.rank));
}

bool Matches(const TensorView& t, DType dtype, std::initializer_list<int64_t> shape) {
  if (t.dtype != dtype || t.rank != static_cast<int32_t>(shape.size())) return false;
  int i = 0;
  for (const int64_t want : shape) {
    if (t.shape[i++] != want) return false;
  }
  return true;
}

absl::Status Mismatch(absl::string_view op, absl::string_view tensor, absl::string_view want,
                      absl::string_view got, absl::string_view what_to_do) {
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": tensor ", tensor, ": want ", want, ", got ", got, "; ", what_to_do));
}

}  // namespace

ShapeCheck& ShapeCheck::Tensor(absl::string_view name, const TensorView& t, DType dtype,
                               std::initializer_list<int64_t> shape) {
  if (!status_.ok()) return *this;
  if (!Matches(t, dtype, shape)) {
    status_ = Mismatch(op_, name, Describe(dtype, shape), Describe(t),
                       "pass a tensor of the wanted shape");
  } else if (t.num_elements() > 0 && t.data == nullptr) {
    status_ = Mismatch(op_, name, "memory", "a null pointer", "allocate it first");
  } else if (t.shape[t.rank - 1] > 1 && t.stride[t.rank - 1] != 1) {
    status_ = Mismatch(op_, name, "unit stride in the last dimension",
                       absl::StrCat("stride ", t.stride[t.rank - 1]), "copy it to dense memory");
  }
  return *this;
}

ShapeCheck& ShapeCheck::Dense(absl::string_view name, const TensorView& t, DType dtype,
                              std::initializer_list<int64_t> shape) {
  Tensor(name, t, dtype, shape);
  if (status_.ok() && !t.contiguous()) {
    status_ = Mismatch(op_, name, "dense memory", "a strided view", "copy it to dense memory");
  }
  return *this;
}

ShapeCheck& ShapeCheck::Optional(absl::string_view name, const TensorView& t, DType dtype,
                                 std::initializer_list<int64_t> shape) {
  return t.present() ? Tensor(name, t, dtype, shape) : *this;
}

ShapeCheck& ShapeCheck::Rank(absl::string_view name, const TensorView& t, int rank) {
  if (status_.ok() && t.rank != rank) {
    status_ = Mismatch(op_, name, absl::StrCat("rank ", rank), Describe(t),
                       "pass a tensor of the wanted rank");
  }
  return *this;
}

ShapeCheck& ShapeCheck::That(bool holds, absl::string_view what, absl::string_view want,
                             int64_t got) {
  if (status_.ok() && !holds) {
    status_ = absl::InvalidArgumentError(
        absl::StrCat(op_, ": ", what, ": want ", want, ", got ", got, "; fix the parameter"));
  }
  return *this;
}

}  // namespace coppice::ops
