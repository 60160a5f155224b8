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
  RETURN_IF_ERROR(
      MatMul({.a = p.norm.out, .b = p.b, .trans_b = true, .c = p.gate_up, .b_is_parameter = true}));
  return SwiGlu({.gate_up = p.gate_up, .out = p.out});
}

absl::Status Ops::Sample(const SampleParams& p) {
  ASSIGN_OR_RETURN(const std::unique_ptr<PendingSample> pending, StartSample(p));
  return pending->Wait();
}

}  // namespace coppice::ops
