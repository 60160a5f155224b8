#include "kernels/cuda/gated_matmul.h"

#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

// With fewer rows cuBLASLt's smaller tiles win back what SwiGLU's own kernel costs.
constexpr int64_t kMinRows = 1024;

// Rows that 16-byte copies may walk.
bool IsWide(const TensorView& t, DType dtype) {
  constexpr int64_t kMaxExtent = int64_t{1} << 30;
  return t.rank == 2 && t.dtype == dtype && t.stride[1] == 1 && t.stride[0] % 8 == 0 &&
         reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.dim(1) % 8 == 0 && t.dim(1) > 0 &&
         t.dim(0) < kMaxExtent && t.dim(1) < kMaxExtent;
}
bool Suits(const Context& context, int64_t rows) {
  return context.compute_capability() == 90 && !context.deterministic() && rows >= kMinRows;
}

absl::StatusOr<int*> Counter(Context& context) {
  ASSIGN_OR_RETURN(char* const scratch, context.Scratch(sizeof(int)));
  return reinterpret_cast<int*>(scratch);
}

}  // namespace

bool FitsGated(const Context& context, const ops::MatMulSwiGluParams& p) {
  const DType dtype = context.compute_dtype();
  return IsWide(p.a, dtype) && Suits(context, p.a.dim(0)) && IsWide(p.b, dtype) &&
         IsWide(p.gate_up, dtype) && p.gate_up.dim(1) % 16 == 0 &&
         (!p.out.present() || IsWide(p.out, dtype));
}
bool FitsGated(const Context& context, const ops::MatMulSwiGluBackwardParams& p) {
  const DType dtype = context.compute_dtype();
  return IsWide(p.d_y, dtype) && Suits(context, p.d_y.dim(0)) && IsWide(p.b, dtype) &&
         IsWide(p.gate_up, dtype) && IsWide(p.d_gate_up, dtype) && IsWide(p.out, dtype);
}

absl::Status GatedMatMul(Context& context, const ops::MatMulSwiGluParams& p) {
  const int64_t rows = p.a.dim(0), k = p.a.dim(1), ffn = p.gate_up.dim(1) / 2;
  RETURN_IF_ERROR(ops::ShapeCheck("matmul_swiglu")
                      .Tensor("b", p.b, context.compute_dtype(), {2 * ffn, k})
                      .Tensor("gate_up", p.gate_up, context.compute_dtype(), {rows, 2 * ffn})
                      .Optional("out", p.out, context.compute_dtype(), {rows, ffn})
                      .status());
  ASSIGN_OR_RETURN(int* const counter, Counter(context));
  const bool keep = p.keep_gate_up || !p.out.present();
  const GatedMatMulArgs args = {.x = p.a.data,
                                .x_stride = p.a.stride[0],
                                .weight = p.b.data,
                                .weight_stride = p.b.stride[0],
                                .gate_up = keep ? p.gate_up.data : nullptr,
                                .gate_up_stride = p.gate_up.stride[0],
                                .act = p.out.present() ? p.out.data : nullptr,
                                .act_stride = p.out.stride[0],
                                .rows = rows,
                                .ffn = ffn,
                                .k = k,
                                .counter = counter,
                                .dtype = p.a.dtype};
  return context.Check(LaunchGatedMatMul(args, context.stream()), "matmul_swiglu");
}

absl::Status GatedMatMulBackward(Context& context, const ops::MatMulSwiGluBackwardParams& p) {
  const int64_t rows = p.d_y.dim(0), k = p.d_y.dim(1), ffn = p.out.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("matmul_swiglu_backward")
                      .Tensor("b", p.b, context.compute_dtype(), {k, ffn})
                      .Tensor("gate_up", p.gate_up, context.compute_dtype(), {rows, 2 * ffn})
                      .Tensor("d_gate_up", p.d_gate_up, context.compute_dtype(), {rows, 2 * ffn})
                      .Tensor("out", p.out, context.compute_dtype(), {rows, ffn})
                      .status());
  ASSIGN_OR_RETURN(int* const counter, Counter(context));
  const GatedBackwardArgs args = {.d_y = p.d_y.data,
                                  .d_y_stride = p.d_y.stride[0],
                                  .weight = p.b.data,
                                  .weight_stride = p.b.stride[0],
                                  .gate_up = p.gate_up.data,
                                  .gate_up_stride = p.gate_up.stride[0],
                                  .d_gate_up = p.d_gate_up.data,
                                  .d_gate_up_stride = p.d_gate_up.stride[0],
                                  .act = p.out.data,
                                  .act_stride = p.out.stride[0],
                                  .rows = rows,
                                  .ffn = ffn,
                                  .k = k,
                                  .counter = counter,
                                  .dtype = p.d_y.dtype};
  return context.Check(LaunchGatedBackward(args, context.stream()), "matmul_swiglu_backward");
}

}  // namespace coppice::cuda
