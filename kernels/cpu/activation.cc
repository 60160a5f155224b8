// SwiGLU (Shazeer 2020, "GLU variants improve transformer"): out = silu(gate) * up, silu(g) = g *
// sigmoid(g). Backward: d_up = d_out * silu(gate),  d_gate = d_out * up * (s + gate * s * (1 - s))
// with s = sigmoid(gate). One pass; 12 bytes per output element forward, 20 backward.
#include "kernels/base/status_macros.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

constexpr int64_t kGrainRows = 8;

}  // namespace

absl::Status SwiGlu(Context& context, const ops::SwiGluParams& p) {
  const int64_t rows = p.out.dim(0), ffn = p.out.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("swiglu")
                      .Tensor("out", p.out, DType::kF32, {rows, ffn})
                      .Tensor("gate_up", p.gate_up, DType::kF32, {rows, 2 * ffn})
                      .status());
  ParallelRanges(context, rows, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* gate = p.gate_up.f32() + i * p.gate_up.stride[0];
      SimdKernels().swiglu(gate, gate + ffn, p.out.f32() + i * p.out.stride[0], ffn);
    }
  });
  return absl::OkStatus();
}

absl::Status SwiGluBackward(Context& context, const ops::SwiGluBackwardParams& p) {
  const int64_t rows = p.d_out.dim(0), ffn = p.d_out.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("swiglu_backward")
                      .Tensor("d_out", p.d_out, DType::kF32, {rows, ffn})
                      .Tensor("gate_up", p.gate_up, DType::kF32, {rows, 2 * ffn})
                      .Tensor("d_gate_up", p.d_gate_up, DType::kF32, {rows, 2 * ffn})
                      .Optional("out", p.out, DType::kF32, {rows, ffn})
                      .status());
  ParallelRanges(context, rows, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* gate = p.gate_up.f32() + i * p.gate_up.stride[0];
      float* d_gate = p.d_gate_up.f32() + i * p.d_gate_up.stride[0];
      SimdKernels().swiglu_backward(
          gate, gate + ffn, p.d_out.f32() + i * p.d_out.stride[0], d_gate, d_gate + ffn,
          p.out.present() ? p.out.f32() + i * p.out.stride[0] : nullptr, ffn);
    }
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
