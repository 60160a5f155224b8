#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {

absl::Status RmsNorm(Context& context, const ops::RmsNormParams& p) {
  const DType type = context.compute_dtype();
  const int64_t rows = p.x.dim(0), hidden = p.x.dim(1);
  const DType in = p.x.dtype == type ? type : DType::kF32;
  RETURN_IF_ERROR(ops::ShapeCheck("rms_norm")
                      .Tensor("x", p.x, in, {rows, hidden})
                      .Tensor("weight", p.weight, type, {hidden})
                      .Tensor("out", p.out, type, {rows, hidden})
                      .Optional("rstd", p.rstd, DType::kF32, {rows})
                      .status());
  return context.Check(LaunchRmsNorm(p, context.stream()), "rms_norm");
}

absl::Status RmsNormBackward(Context& context, const ops::RmsNormBackwardParams& p) {
  const DType type = context.compute_dtype();
  const int64_t rows = p.x.dim(0), hidden = p.x.dim(1);
  constexpr int64_t kMaxHidden = 11 * 1024;  // a row of sums in shared memory
  RETURN_IF_ERROR(ops::ShapeCheck("rms_norm_backward")
                      .Tensor("x", p.x, DType::kF32, {rows, hidden})
                      .Tensor("d_out", p.d_out, type, {rows, hidden})
                      .Tensor("weight", p.weight, type, {hidden})
                      .Tensor("rstd", p.rstd, DType::kF32, {rows})
                      .Tensor("d_x", p.d_x, type, {rows, hidden})
                      .Tensor("d_weight", p.d_weight, DType::kF32, {hidden})
                      .Optional("out", p.out, type, {rows, hidden})
                      .That(hidden <= kMaxHidden, "hidden", "at most 11264", hidden)
                      .status());
  ASSIGN_OR_RETURN(char* scratch, context.Scratch(NumPartials(rows) * hidden *
                                                  static_cast<int64_t>(sizeof(float))));
  return context.Check(
      LaunchRmsNormBackward(p, reinterpret_cast<float*>(scratch), context.stream()),
      "rms_norm_backward");
}

}  // namespace coppice::cuda
