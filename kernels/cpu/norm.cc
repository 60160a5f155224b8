// RMSNorm (Zhang & Sennrich 2019, "Root mean square layer normalization"):
//   out = x * rstd * weight,  rstd = 1 / sqrt(mean(x^2) + eps)
// Backward, with g = d_out * weight:
//   d_x = rstd * (g - x * rstd^2 * mean(g x)),   d_weight = sum over rows of d_out * x * rstd
// Traffic: forward reads x once from memory (the second pass hits L1) and writes out; bound by
// memory bandwidth.
#include "kernels/base/status_macros.h"
#include "kernels/cpu/column_sums.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {

absl::Status RmsNorm(Context& context, const ops::RmsNormParams& p) {
  const int64_t rows = p.x.dim(0), hidden = p.x.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("rms_norm")
                      .Tensor("x", p.x, DType::kF32, {rows, hidden})
                      .Tensor("weight", p.weight, DType::kF32, {hidden})
                      .Tensor("out", p.out, DType::kF32, {rows, hidden})
                      .Optional("rstd", p.rstd, DType::kF32, {rows})
                      .status());
  ParallelRanges(context, rows, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float rstd = SimdKernels().rms_norm(p.x.f32() + i * p.x.stride[0], p.weight.f32(),
                                                p.eps, p.out.f32() + i * p.out.stride[0], hidden);
      if (p.rstd.present()) p.rstd.f32()[i] = rstd;
    }
  });
  return absl::OkStatus();
}

absl::Status RmsNormBackward(Context& context, const ops::RmsNormBackwardParams& p) {
  const int64_t rows = p.x.dim(0), hidden = p.x.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("rms_norm_backward")
                      .Tensor("x", p.x, DType::kF32, {rows, hidden})
                      .Tensor("d_out", p.d_out, DType::kF32, {rows, hidden})
                      .Tensor("weight", p.weight, DType::kF32, {hidden})
                      .Tensor("rstd", p.rstd, DType::kF32, {rows})
                      .Tensor("d_x", p.d_x, DType::kF32, {rows, hidden})
                      .Tensor("d_weight", p.d_weight, DType::kF32, {hidden})
                      .Optional("out", p.out, DType::kF32, {rows, hidden})
                      .status());
  const auto add_rows = [&](int64_t begin, int64_t end, float* d_weight) {
    for (int64_t i = begin; i < end; ++i) {
      SimdKernels().rms_norm_backward(
          p.d_out.f32() + i * p.d_out.stride[0], p.x.f32() + i * p.x.stride[0], p.weight.f32(),
          p.rstd.f32()[i], p.accumulate_d_x, p.d_x.f32() + i * p.d_x.stride[0], d_weight,
          p.out.present() ? p.out.f32() + i * p.out.stride[0] : nullptr, hidden);
    }
  };
  SumOverRows(context, rows, hidden, p.d_weight.f32(), add_rows);
  return absl::OkStatus();
}

}  // namespace coppice::cpu
