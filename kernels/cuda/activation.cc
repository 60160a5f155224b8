#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {

absl::Status SwiGlu(Context& context, const ops::SwiGluParams& p) {
  const DType type = context.compute_dtype();
  const int64_t rows = p.out.dim(0), ffn = p.out.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("swiglu")
                      .Tensor("out", p.out, type, {rows, ffn})
                      .Tensor("gate_up", p.gate_up, type, {rows, 2 * ffn})
                      .status());
  return context.Check(LaunchSwiGlu(p, context.stream()), "swiglu");
}

absl::Status SwiGluBackward(Context& context, const ops::SwiGluBackwardParams& p) {
  const DType type = context.compute_dtype();
  const int64_t rows = p.d_out.dim(0), ffn = p.d_out.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("swiglu_backward")
                      .Tensor("d_out", p.d_out, type, {rows, ffn})
                      .Tensor("gate_up", p.gate_up, type, {rows, 2 * ffn})
                      .Tensor("d_gate_up", p.d_gate_up, type, {rows, 2 * ffn})
                      .Optional("out", p.out, type, {rows, ffn})
                      .status());
  return context.Check(LaunchSwiGluBackward(p, context.stream()), "swiglu_backward");
}

}  // namespace coppice::cuda
