// What forward and backward of tree attention share: checks, the place of every key in memory, and
// packing of query rows.
#pragma once

#include "absl/status/status.h"
#include "kernels/cpu/batch_plan.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/ops/params.h"

namespace coppice::cpu {

inline const CpuBatchPlan& CpuPlan(const ops::BatchPlan* plan) {
  return *static_cast<const CpuBatchPlan*>(plan);
}

// Checks q, k, v and, when the plan has context nodes, its pages.
absl::Status CheckAttentionInputs(absl::string_view op, const ops::BatchPlan* plan,
                                  const TensorView& q, const TensorView& k, const TensorView& v,
                                  const ops::PagedKv& context, float scale);

// Keys (or values, or their gradients) of one KV head: packed rows and pages.
struct KeyMemory {
  const ops::TokenBatch& batch;
  TensorView rows;   // [rows, kv_heads, head_dim] f32
  TensorView pages;  // [blocks, block_tokens, kv_heads, head_dim] f32; absent without context
  int64_t head;

  // The vector of token `i` of a run.
  float* Vector(const KeyRun& run, int64_t i) const;
  // The vectors at path positions [begin, end); returns how many exist.
  int64_t Vectors(const std::vector<KeyRun>& path, int64_t begin, int64_t end,
                  const float** out) const;
};

// Query-side vectors of the rows in `range`, for the heads that read kv head `kv_head`, become
// dense rows (row, then head) of `out` [rows * group, dim]. t: [rows, q_heads, head_dim].
void PackQueries(const TensorView& t, RowRange range, int64_t kv_head, int64_t group, int64_t dim,
                 float* out);
// The inverse, without padding.
void UnpackQueries(const float* packed, RowRange range, int64_t kv_head, int64_t group, int64_t dim,
                   const TensorView& t);

}  // namespace coppice::cpu
