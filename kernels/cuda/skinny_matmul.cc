#include "kernels/cuda/skinny_matmul.h"

#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

bool IsMatrix(const TensorView& t, DType dtype) {
  return t.rank == 2 && t.dtype == dtype && t.stride[1] == 1;
}
bool AlignedTo(const TensorView& t, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(t.data) % bytes == 0;
}
// Rows that 16-byte copies may walk.
bool IsWide(const TensorView& t, DType dtype) {
  return IsMatrix(t, dtype) && AlignedTo(t, 16) && t.dim(1) % 8 == 0 && t.stride[0] % 8 == 0;
}
// Rows that pairs of elements may walk.
bool IsPaired(const TensorView& t) {
  return AlignedTo(t, 2 * SizeOf(t.dtype)) && t.dim(t.rank - 1) % 2 == 0 &&
         (t.rank == 1 || t.stride[0] % 2 == 0);
}

// Whatever brings x.
bool Fits(const Context& context, int64_t rows, const TensorView& w, const TensorView& c) {
  constexpr int64_t kMaxColumns = int64_t{1} << 21;  // tiles are a grid's second dimension
  const bool suits = context.compute_capability() == 90 && !context.deterministic();
  return suits && rows >= 1 && rows <= kMaxSkinnyRows && IsWide(w, context.compute_dtype()) &&
         w.dim(0) < kMaxColumns && w.dim(1) > 0 && c.rank == 2 && IsPaired(c);
}
// Whether the product may norm x itself. Backward wants the normed rows, so not where it follows.
bool FitsNorm(const ops::RmsNormParams& norm) {
  return !norm.rstd.present() && IsWide(norm.x, DType::kF32) &&
         norm.x.dim(0) <= kMaxSkinnyNormedRows && AlignedTo(norm.weight, 16);
}

SkinnyArgs ArgsOf(const TensorView& x, const TensorView& w, const TensorView& c) {
  return {.x = x.data,
          .x_stride = x.stride[0],
          .w = w.data,
          .w_stride = w.stride[0],
          .dtype = w.dtype,
          .c = c.data,
          .c_stride = c.stride[0],
          .c_is_f32 = c.dtype == DType::kF32,
          .rows = x.dim(0),
          .n = w.dim(0),
          .k = w.dim(1)};
}
SkinnyArgs ArgsOf(const ops::RmsNormParams& norm, const TensorView& w, const TensorView& c) {
  SkinnyArgs args = ArgsOf(norm.x, w, c);
  args.norm = norm.weight.data;
  args.eps = norm.eps;
  return args;
}

absl::Status Run(Context& context, const SkinnyArgs& args) {
  return context.Check(LaunchSkinnyMatMul(args, context.stream()), "skinny matmul");
}

}  // namespace

bool FitsSkinny(const Context& context, const ops::MatMulParams& p) {
  return p.trans_b && !p.trans_a && IsWide(p.a, context.compute_dtype()) &&
         Fits(context, p.a.dim(0), p.b, p.c) && (!p.bias.present() || IsPaired(p.bias)) &&
         (!p.addend.present() || IsPaired(p.addend));
}
bool FitsSkinny(const Context& context, const ops::NormMatMulParams& p) {
  return FitsNorm(p.norm) && Fits(context, p.norm.x.dim(0), p.b, p.c) &&
         (!p.bias.present() || IsPaired(p.bias));
}
bool FitsSkinny(const Context& context, const ops::NormSwiGluParams& p) {
  const bool has_rows =
      FitsNorm(p.norm) || (!p.norm.rstd.present() && IsWide(p.norm.out, context.compute_dtype()));
  return has_rows && Fits(context, p.norm.x.dim(0), p.b, p.out) && p.b.dim(0) % 2 == 0;
}

absl::Status SkinnyMatMul(Context& context, const ops::MatMulParams& p) {
  SkinnyArgs args = ArgsOf(p.a, p.b, p.c);
  args.w_is_parameter = p.b_is_parameter;
  args.bias = p.bias.data;
  args.addend = p.addend.data;
  args.addend_stride = p.addend.stride[0];
  return Run(context, args);
}

absl::Status SkinnyNormMatMul(Context& context, const ops::NormMatMulParams& p) {
  const int64_t rows = p.norm.x.dim(0), hidden = p.norm.x.dim(1), n = p.b.dim(0);
  const DType f = context.compute_dtype(), out = p.c.dtype == DType::kF32 ? DType::kF32 : f;
  RETURN_IF_ERROR(ops::ShapeCheck("norm_matmul")
                      .Tensor("x", p.norm.x, DType::kF32, {rows, hidden})
                      .Tensor("weight", p.norm.weight, f, {hidden})
                      .Tensor("b", p.b, f, {n, hidden})
                      .Optional("bias", p.bias, f, {n})
                      .Tensor("c", p.c, out, {rows, n})
                      .status());
  SkinnyArgs args = ArgsOf(p.norm, p.b, p.c);
  args.w_is_parameter = true;
  args.bias = p.bias.data;
  return Run(context, args);
}

absl::Status SkinnyNormSwiGlu(Context& context, const ops::NormSwiGluParams& p) {
  const int64_t rows = p.norm.x.dim(0), hidden = p.norm.x.dim(1), ffn = p.out.dim(1);
  const DType f = context.compute_dtype();
  RETURN_IF_ERROR(ops::ShapeCheck("norm_swiglu")
                      .Tensor("weight", p.norm.weight, f, {hidden})
                      .Tensor("b", p.b, f, {2 * ffn, hidden})
                      .Tensor("out", p.out, f, {rows, ffn})
                      .status());
  SkinnyArgs args;
  if (FitsNorm(p.norm)) {
    args = ArgsOf(p.norm, p.b, p.out);
  } else {
    RETURN_IF_ERROR(RmsNorm(context, p.norm));
    args = ArgsOf(p.norm.out, p.b, p.out);
  }
  args.w_is_parameter = true;
  args.swiglu = true;
  return Run(context, args);
}

}  // namespace coppice::cuda
