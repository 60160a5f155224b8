#include "kernels/cpu/attention_inputs.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/status_macros.h"
#include "kernels/ops/shape_check.h"

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
  const int64_t rows = plan->batch().num_rows();
  const int64_t q_heads = q.dim(1), kv_heads = k.dim(1), head_dim = q.dim(2);
  ops::ShapeCheck check(op);
  check.Tensor("q", q, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("k", k, DType::kF32, {rows, kv_heads, head_dim})
      .Tensor("v", v, DType::kF32, {rows, kv_heads, head_dim})
      .That(kv_heads > 0 && q_heads % kv_heads == 0, "q_heads", "a multiple of kv_heads", q_heads);
  const int64_t last_block = CpuPlan(plan).max_context_block();
  if (last_block < 0) return check.status();
  const int64_t blocks = context.k.dim(0), block_tokens = plan->batch().block_tokens;
  return check
      .Dense("context.k", context.k, DType::kF32, {blocks, block_tokens, kv_heads, head_dim})
      .Dense("context.v", context.v, DType::kF32, {blocks, block_tokens, kv_heads, head_dim})
      .That(last_block < blocks, "context block", "below the blocks of context.k", last_block)
      .status();
}

float* KeyMemory::Vector(const KeyRun& run, int64_t i) const {
  if (run.row >= 0) return rows.f32() + (run.row + i) * rows.stride[0] + head * rows.stride[1];
  const int64_t block = batch.context_blocks[run.block_begin + i / batch.block_tokens];
  return pages.f32() + block * pages.stride[0] + i % batch.block_tokens * pages.stride[1] +
         head * pages.stride[2];
}

int64_t KeyMemory::Vectors(const std::vector<KeyRun>& path, int64_t begin, int64_t end,
                           const float** out) const {
  int64_t n = 0;
  for (const KeyRun& run : path) {
    const int64_t first = std::max(begin, run.position) - run.position;
    const int64_t last = std::min(end - run.position, run.num_tokens);
    for (int64_t i = first; i < last; ++i) out[n++] = Vector(run, i);
  }
  return n;
}

void PackQueries(const TensorView& t, RowRange range, int64_t kv_head, int64_t group, int64_t dim,
                 float* out) {
  const int64_t head_dim = t.dim(2);
  for (int64_t row = range.begin; row < range.end; ++row) {
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h, out += dim) {
      std::memcpy(out, t.f32() + row * t.stride[0] + h * t.stride[1], head_dim * sizeof(float));
      std::memset(out + head_dim, 0, (dim - head_dim) * sizeof(float));
    }
  }
}

void UnpackQueries(const float* packed, RowRange range, int64_t kv_head, int64_t group, int64_t dim,
                   const TensorView& t) {
  for (int64_t row = range.begin; row < range.end; ++row) {
    for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h, packed += dim) {
      std::memcpy(t.f32() + row * t.stride[0] + h * t.stride[1], packed, t.dim(2) * sizeof(float));
    }
  }
}

}  // namespace coppice::cpu
