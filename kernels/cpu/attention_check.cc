#include "kernels/cpu/attention_check.h"

#include "kernels/base/status_macros.h"

namespace coppice::cpu {

absl::Status CheckAttentionInputs(absl::string_view op, const ops::BatchPlan* plan,
                                  const TensorView& q, const TensorView& k, const TensorView& v,
                                  const ops::PagedKv& context, float scale) {
  RETURN_IF_ERROR(ops::ShapeCheck(op)
                      .That(plan != nullptr, "plan", "a batch plan", 0)
                      .That(scale > 0, "scale", "a positive number", static_cast<int64_t>(scale))
                      .Rank("q", q, 3)
                      .Rank("k", k, 3)
                      .status());
  const auto& cpu_plan = *static_cast<const CpuBatchPlan*>(plan);
  const int64_t rows = plan->batch().num_rows();
  const int64_t q_heads = q.dim(1), kv_heads = k.dim(1), head_dim = q.dim(2);
  ops::ShapeCheck check(op);
  check.Tensor("q", q, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("k", k, DType::kF32, {rows, kv_heads, head_dim})
      .Tensor("v", v, DType::kF32, {rows, kv_heads, head_dim})
      .That(kv_heads > 0 && q_heads % kv_heads == 0, "q_heads", "a multiple of kv_heads", q_heads);
  if (cpu_plan.max_context_block() < 0) return check.status();
  const int64_t blocks = context.k.dim(0), block_tokens = plan->batch().block_tokens;
  return check
      .Dense("context.k", context.k, DType::kF32, {blocks, block_tokens, kv_heads, head_dim})
      .Dense("context.v", context.v, DType::kF32, {blocks, block_tokens, kv_heads, head_dim})
      .That(cpu_plan.max_context_block() < blocks, "context block", "below the blocks of context.k",
            cpu_plan.max_context_block())
      .status();
}

}  // namespace coppice::cpu
