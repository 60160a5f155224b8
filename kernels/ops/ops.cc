#include "kernels/ops/ops.h"

#include "kernels/base/status_macros.h"

namespace coppice::ops {

absl::Status Ops::NormMatMul(const NormMatMulParams& p) {
  RETURN_IF_ERROR(RmsNorm(p.norm));
  return MatMul({.a = p.norm.out,
                 .b = p.b,
                 .trans_b = true,
                 .bias = p.bias,
                 .c = p.c,
                 .b_is_parameter = true});
}

absl::Status Ops::NormSwiGlu(const NormSwiGluParams& p) {
  RETURN_IF_ERROR(RmsNorm(p.norm));
  return MatMulSwiGlu(
      {.a = p.norm.out,
       .b = p.b,
       .gate_up = p.gate_up,
       .out = p.out,
       .keep_gate_up = (p.norm.rstd.present() && p.keep_gate_up) || !p.out.present()});
}

absl::Status Ops::MatMulSwiGlu(const MatMulSwiGluParams& p) {
  RETURN_IF_ERROR(
      MatMul({.a = p.a, .b = p.b, .trans_b = true, .c = p.gate_up, .b_is_parameter = true}));
  return p.out.present() ? SwiGlu({.gate_up = p.gate_up, .out = p.out}) : absl::OkStatus();
}

absl::Status Ops::MatMulSwiGluBackward(const MatMulSwiGluBackwardParams& p) {
  RETURN_IF_ERROR(MatMul({.a = p.d_y, .b = p.b, .c = p.out}));
  return SwiGluBackward(
      {.gate_up = p.gate_up, .d_out = p.out, .d_gate_up = p.d_gate_up, .out = p.out});
}

absl::Status Ops::MlpBlock(const MlpBlockParams& p) {
  const TensorView& mid = p.mlp.norm.x;
  RETURN_IF_ERROR(MatMul({.a = p.attn_out,
                          .b = p.o,
                          .trans_b = true,
                          .addend = p.input,
                          .c = mid,
                          .b_is_parameter = true}));
  RETURN_IF_ERROR(NormSwiGlu(p.mlp));
  RETURN_IF_ERROR(MatMul({.a = p.mlp.out,
                          .b = p.down,
                          .trans_b = true,
                          .addend = mid,
                          .c = p.output,
                          .b_is_parameter = true}));
  if (p.next.c.present()) RETURN_IF_ERROR(NormMatMul(p.next));
  return p.rotate.plan != nullptr ? QkNormRope(p.rotate) : absl::OkStatus();
}

absl::Status Ops::Sample(const SampleParams& p) {
  ASSIGN_OR_RETURN(const std::unique_ptr<PendingSample> pending, StartSample(p));
  return pending->Wait();
}

}  // namespace coppice::ops
