#include "kernels/base/status_macros.h"
#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

constexpr int64_t kMaxHeadDim = 256;  // a head in one warp's registers

absl::Status CheckBackward(const Context& context, const ops::QkNormRopeBackwardParams& p) {
  constexpr absl::string_view kOp = "qk_norm_rope_backward";
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .That(p.plan != nullptr, "plan", "a batch plan", 0)
                      .Rank("d_q_out", p.d_q_out, 3)
                      .Rank("d_k_out", p.d_k_out, 3)
                      .Rank("rope", p.rope, 2)
                      .status());
  const CudaBatchPlan& plan = CudaPlan(p.plan);
  const int64_t rows = plan.batch().num_rows(), head_dim = p.d_q_out.dim(2);
  const int64_t q_heads = p.d_q_out.dim(1), kv_heads = p.d_k_out.dim(1);
  const DType type = context.compute_dtype();
  ops::ShapeCheck check(kOp);
  check.Tensor("d_q_out", p.d_q_out, type, {rows, q_heads, head_dim})
      .Tensor("d_k_out", p.d_k_out, type, {rows, kv_heads, head_dim})
      .Tensor("d_q_in", p.d_q_in, type, {rows, q_heads, head_dim})
      .Tensor("d_k_in", p.d_k_in, type, {rows, kv_heads, head_dim})
      .Tensor("rope", p.rope, DType::kF32, {p.rope.dim(0), head_dim})
      .Optional("q_norm", p.q_norm, type, {head_dim})
      .Optional("k_norm", p.k_norm, type, {head_dim})
      .That(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "head_dim", "an even number up to 256",
            head_dim)
      .That(plan.max_position() < p.rope.dim(0), "position", "below the rows of rope",
            plan.max_position());
  if (p.q_norm.present()) {
    check.Tensor("q_in", p.q_in, type, {rows, q_heads, head_dim})
        .Tensor("d_q_norm", p.d_q_norm, DType::kF32, {head_dim});
  }
  if (p.k_norm.present()) {
    check.Tensor("k_in", p.k_in, type, {rows, kv_heads, head_dim})
        .Tensor("d_k_norm", p.d_k_norm, DType::kF32, {head_dim});
  }
  return check.status();
}

}  // namespace

absl::Status CheckQkNormRope(const Context& context, const ops::QkNormRopeParams& p) {
  constexpr absl::string_view kOp = "qk_norm_rope";
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .That(p.plan != nullptr, "plan", "a batch plan", 0)
                      .Rank("q_in", p.q_in, 3)
                      .Rank("k_in", p.k_in, 3)
                      .Rank("rope", p.rope, 2)
                      .status());
  const CudaBatchPlan& plan = CudaPlan(p.plan);
  const int64_t rows = plan.batch().num_rows(), head_dim = p.q_in.dim(2);
  const int64_t q_heads = p.q_in.dim(1), kv_heads = p.k_in.dim(1);
  const DType type = context.compute_dtype();
  ops::ShapeCheck check(kOp);
  check.Tensor("q_in", p.q_in, type, {rows, q_heads, head_dim})
      .Tensor("k_in", p.k_in, type, {rows, kv_heads, head_dim})
      .Optional("q_norm", p.q_norm, type, {head_dim})
      .Optional("k_norm", p.k_norm, type, {head_dim})
      .Tensor("rope", p.rope, DType::kF32, {p.rope.dim(0), head_dim})
      .Tensor("q_out", p.q_out, type, {rows, q_heads, head_dim})
      .Tensor("k_out", p.k_out, type, {rows, kv_heads, head_dim})
      .That(head_dim % 2 == 0 && head_dim <= kMaxHeadDim, "head_dim", "an even number up to 256",
            head_dim)
      .That(plan.max_position() < p.rope.dim(0), "position", "below the rows of rope",
            plan.max_position());
  if (!p.pages.k.present() || plan.max_kv_slot() < 0) return check.status();
  const int64_t blocks = p.pages.k.dim(0), block_tokens = plan.batch().block_tokens;
  return check.Tensor("v", p.v, type, {rows, kv_heads, head_dim})
      .Dense("pages.k", p.pages.k, type, {blocks, block_tokens, kv_heads, head_dim})
      .Dense("pages.v", p.pages.v, type, {blocks, block_tokens, kv_heads, head_dim})
      .That(plan.max_kv_slot() < blocks * block_tokens, "kv slot", "below the slots of the pool",
            plan.max_kv_slot())
      .status();
}

absl::Status QkNormRope(Context& context, const ops::QkNormRopeParams& p) {
  RETURN_IF_ERROR(CheckQkNormRope(context, p));
  const CudaBatchPlan& plan = CudaPlan(p.plan);
  const bool stores = p.pages.k.present() && plan.max_kv_slot() >= 0;
  return context.Check(LaunchQkNormRope(p, plan.positions().i32(),
                                        stores ? plan.kv_slots().i32() : nullptr, context.stream()),
                       "qk_norm_rope");
}

absl::Status QkNormRopeBackward(Context& context, const ops::QkNormRopeBackwardParams& p) {
  RETURN_IF_ERROR(CheckBackward(context, p));
  const CudaBatchPlan& plan = CudaPlan(p.plan);
  const int64_t partials = NumPartials(plan.batch().num_rows()) * p.d_q_out.dim(2);
  ASSIGN_OR_RETURN(char* scratch, context.Scratch(partials * static_cast<int64_t>(sizeof(float))));
  const auto run = [&](const RopeBackwardSide& side) {
    return context.Check(LaunchRopeBackward(side, p.eps, p.rope, plan.positions().i32(),
                                            reinterpret_cast<float*>(scratch), context.stream()),
                         "qk_norm_rope_backward");
  };
  RETURN_IF_ERROR(run({p.d_q_out, p.q_in, p.q_norm, p.d_q_in, p.d_q_norm.f32()}));
  return run({p.d_k_out, p.k_in, p.k_norm, p.d_k_in, p.d_k_norm.f32()});
}

}  // namespace coppice::cuda
