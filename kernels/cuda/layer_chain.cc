#include "kernels/cuda/layer_chain.h"

#include "kernels/base/status_macros.h"
#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

bool AlignedTo(const TensorView& t, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(t.data) % bytes == 0;
}
// Rows that 16-byte copies may walk.
bool IsWide(const TensorView& t, DType dtype) {
  return t.rank == 2 && t.dtype == dtype && t.stride[1] == 1 && AlignedTo(t, 16) &&
         t.dim(1) % 8 == 0 && t.stride[0] % 8 == 0;
}
// Rows of the residual stream.
bool IsPaired(const TensorView& t) {
  return t.rank == 2 && t.dtype == DType::kF32 && t.stride[1] == 1 && AlignedTo(t, 8) &&
         t.stride[0] % 2 == 0;
}
bool FitsNorm(const ops::RmsNormParams& norm, DType dtype) {
  return !norm.rstd.present() && IsPaired(norm.x) && IsWide(norm.out, dtype) &&
         AlignedTo(norm.weight, 4);
}

absl::Status CheckShapes(const ops::MlpBlockParams& p, DType f) {
  const ops::RmsNormParams& norm = p.mlp.norm;
  const int64_t rows = norm.x.dim(0), hidden = norm.x.dim(1);
  const int64_t columns = p.attn_out.dim(1), ffn = p.mlp.out.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("mlp_block")
                      .Tensor("attn_out", p.attn_out, f, {rows, columns})
                      .Tensor("o", p.o, f, {hidden, columns})
                      .Tensor("input", p.input, DType::kF32, {rows, hidden})
                      .Tensor("norm", norm.weight, f, {hidden})
                      .Tensor("norm.out", norm.out, f, {rows, hidden})
                      .Tensor("gate_up", p.mlp.b, f, {2 * ffn, hidden})
                      .Tensor("act", p.mlp.out, f, {rows, ffn})
                      .Tensor("down", p.down, f, {hidden, ffn})
                      .Tensor("output", p.output, DType::kF32, {rows, hidden})
                      .status());
  if (!p.next.c.present()) return absl::OkStatus();
  const int64_t n = p.next.b.dim(0);
  return ops::ShapeCheck("mlp_block")
      .Tensor("next.weight", p.next.norm.weight, f, {hidden})
      .Tensor("next.out", p.next.norm.out, f, {rows, hidden})
      .Tensor("next.b", p.next.b, f, {n, hidden})
      .Optional("next.bias", p.next.bias, f, {n})
      .Tensor("next.c", p.next.c, f, {rows, n})
      .status();
}

// Whether `heads` are `columns` of the projections from `first` on.
bool AreColumns(const TensorView& heads, const TensorView& c, int64_t first) {
  return heads.rank == 3 && heads.dim(0) == c.dim(0) && heads.stride[0] == c.stride[0] &&
         heads.stride[1] == heads.dim(2) && heads.stride[2] == 1 &&
         heads.data == c.as<char>() + first * SizeOf(c.dtype);
}
ChainRotation RotationOf(const ops::QkNormRopeParams& p) {
  const CudaBatchPlan& plan = CudaPlan(p.plan);
  const bool stores = p.pages.k.present() && plan.max_kv_slot() >= 0;
  return {.positions = plan.positions().i32(),
          .kv_slots = stores ? plan.kv_slots().i32() : nullptr,
          .rope = p.rope.f32(),
          .q_norm = p.q_norm.data,
          .k_norm = p.k_norm.data,
          .page_k = p.pages.k.data,
          .page_v = p.pages.v.data,
          .q_heads = static_cast<int>(p.q_in.dim(1)),
          .kv_heads = static_cast<int>(p.k_in.dim(1)),
          .head_dim = static_cast<int>(p.q_in.dim(2))};
}

ChainMatrix Matrix(const TensorView& t) { return {t.data, t.stride[0]}; }

}  // namespace

// Heads that fill tiles and lie in the projections, in place.
bool FitsRotation(const ops::MlpBlockParams& p) {
  const ops::QkNormRopeParams& r = p.rotate;
  const TensorView& c = p.next.c;
  if (r.plan == nullptr || !c.present() || r.q_in.rank != 3 || r.k_in.rank != 3) return false;
  const int64_t dim = r.q_in.dim(2), q = r.q_in.dim(1) * dim, kv = r.k_in.dim(1) * dim;
  return (dim == 64 || dim == 128) && r.k_in.dim(2) == dim && c.dim(1) == q + 2 * kv &&
         AreColumns(r.q_in, c, 0) && AreColumns(r.k_in, c, q) && AreColumns(r.v, c, q + kv) &&
         AreColumns(r.q_out, c, 0) && AreColumns(r.k_out, c, q) && r.eps == p.mlp.norm.eps &&
         r.rope.rank == 2 && r.rope.stride[0] == dim && AlignedTo(r.rope, 8) &&
         AlignedTo(r.q_norm, 4) && AlignedTo(r.k_norm, 4) && AlignedTo(r.pages.k, 4) &&
         AlignedTo(r.pages.v, 4);
}

bool FitsChain(const Context& context, const ops::MlpBlockParams& p) {
  if (context.chain_memory().data == nullptr || context.deterministic()) return false;
  const int64_t rows = p.mlp.norm.x.dim(0);
  if (rows < 1 || rows > kMaxChainRows || p.mlp.norm.x.dim(1) > kMaxChainHidden) return false;
  const DType f = context.compute_dtype();
  const bool fits = FitsNorm(p.mlp.norm, f) && IsPaired(p.input) && IsPaired(p.output) &&
                    IsWide(p.attn_out, f) && IsWide(p.o, f) && IsWide(p.mlp.b, f) &&
                    IsWide(p.mlp.out, f) && IsWide(p.down, f) && p.attn_out.dim(1) > 0 &&
                    p.mlp.out.dim(1) > 0;
  if (!p.next.c.present()) return fits;
  return fits && FitsNorm(p.next.norm, f) && p.next.norm.x.data == p.output.data &&
         p.next.norm.eps == p.mlp.norm.eps && IsWide(p.next.b, f) && IsWide(p.next.c, f) &&
         (!p.next.bias.present() || AlignedTo(p.next.bias, 4));
}

absl::Status LayerChain(Context& context, const ops::MlpBlockParams& p) {
  RETURN_IF_ERROR(CheckShapes(p, context.compute_dtype()));
  LayerChainArgs args = {.dtype = context.compute_dtype(),
                         .attn_out = p.attn_out.data,
                         .attn_out_stride = p.attn_out.stride[0],
                         .o = Matrix(p.o),
                         .gate_up = Matrix(p.mlp.b),
                         .down = Matrix(p.down),
                         .input = p.input.data,
                         .mid = p.mlp.norm.x.data,
                         .output = p.output.data,
                         .input_stride = p.input.stride[0],
                         .mid_stride = p.mlp.norm.x.stride[0],
                         .output_stride = p.output.stride[0],
                         .mlp_in = p.mlp.norm.out.data,
                         .act = p.mlp.out.data,
                         .mlp_in_stride = p.mlp.norm.out.stride[0],
                         .act_stride = p.mlp.out.stride[0],
                         .mlp_norm = p.mlp.norm.weight.data,
                         .eps = p.mlp.norm.eps,
                         .rows = p.attn_out.dim(0),
                         .hidden = p.output.dim(1),
                         .attn_columns = p.attn_out.dim(1),
                         .ffn = p.mlp.out.dim(1)};
  if (p.next.c.present()) {
    args.attn_in = p.next.norm.out.data;
    args.attn_in_stride = p.next.norm.out.stride[0];
    args.next_norm = p.next.norm.weight.data;
    args.qkv = Matrix(p.next.b);
    args.qkv_bias = p.next.bias.data;
    args.qkv_out = p.next.c.data;
    args.qkv_out_stride = p.next.c.stride[0];
    args.qkv_columns = p.next.b.dim(0);
  }
  const bool rotates = FitsRotation(p);
  if (rotates) {
    RETURN_IF_ERROR(CheckQkNormRope(context, p.rotate));
    args.rotation = RotationOf(p.rotate);
  }
  RETURN_IF_ERROR(context.Check(LaunchLayerChain(args, context.chain_memory(), context.stream()),
                                "layer chain"));
  return rotates || p.rotate.plan == nullptr ? absl::OkStatus() : QkNormRope(context, p.rotate);
}

}  // namespace coppice::cuda
