// Tree attention, forward, row by row.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/cpu/attention_check.h"
#include "kernels/cpu/attention_keys.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"

namespace coppice::cpu {

absl::Status TreeAttention(Context& context, const ops::TreeAttentionParams& p) {
  RETURN_IF_ERROR(
      CheckAttentionInputs("tree_attention", p.plan, p.q, p.k, p.v, p.context, p.scale));
  const int64_t rows = p.q.dim(0), q_heads = p.q.dim(1), head_dim = p.q.dim(2);
  RETURN_IF_ERROR(ops::ShapeCheck("tree_attention")
                      .Tensor("out", p.out, DType::kF32, {rows, q_heads, head_dim})
                      .Optional("lse", p.lse, DType::kF32, {rows, q_heads})
                      .status());
  const auto& plan = *static_cast<const CpuBatchPlan*>(p.plan);
  const int64_t group = q_heads / p.k.dim(1);
  ParallelFor(context.num_threads(), plan.nodes().size() * q_heads, [&](int64_t item, int) {
    const TreeNode& node = plan.nodes()[item / q_heads];
    const int64_t h = item % q_heads;
    const std::vector<const float*> keys = PathPointers(plan, node, p.k, p.context.k, h / group);
    const std::vector<const float*> values = PathPointers(plan, node, p.v, p.context.v, h / group);
    for (int64_t row = node.row_begin; row < node.row_end; ++row) {
      const int64_t visible = plan.batch().positions[row] + 1;
      const float* q = p.q.f32() + row * p.q.stride[0] + h * p.q.stride[1];
      std::vector<float> s(visible);
      for (int64_t j = 0; j < visible; ++j) {
        float dot = 0;
        for (int64_t d = 0; d < head_dim; ++d) dot += q[d] * keys[j][d];
        s[j] = dot * p.scale;
      }
      const float max = *std::max_element(s.begin(), s.end());
      float sum = 0;
      for (float& x : s) sum += x = std::exp(x - max);
      float* out = p.out.f32() + row * p.out.stride[0] + h * p.out.stride[1];
      std::fill(out, out + head_dim, 0.0f);
      for (int64_t j = 0; j < visible; ++j) {
        for (int64_t d = 0; d < head_dim; ++d) out[d] += s[j] / sum * values[j][d];
      }
      if (p.lse.present()) p.lse.f32()[row * p.lse.stride[0] + h] = max + std::log(sum);
    }
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
