// Tree attention, backward, row by row.
#include <cmath>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/cpu/attention_check.h"
#include "kernels/cpu/attention_keys.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"

namespace coppice::cpu {

absl::Status TreeAttentionBackward(Context& context, const ops::TreeAttentionBackwardParams& p) {
  constexpr absl::string_view kOp = "tree_attention_backward";
  RETURN_IF_ERROR(CheckAttentionInputs(kOp, p.plan, p.q, p.k, p.v, p.context, p.scale));
  const int64_t rows = p.q.dim(0), q_heads = p.q.dim(1), head_dim = p.q.dim(2);
  const int64_t kv_heads = p.k.dim(1), group = q_heads / kv_heads;
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .Tensor("out", p.out, DType::kF32, {rows, q_heads, head_dim})
                      .Tensor("lse", p.lse, DType::kF32, {rows, q_heads})
                      .Tensor("d_out", p.d_out, DType::kF32, {rows, q_heads, head_dim})
                      .Tensor("d_q", p.d_q, DType::kF32, {rows, q_heads, head_dim})
                      .Tensor("d_k", p.d_k, DType::kF32, {rows, kv_heads, head_dim})
                      .Tensor("d_v", p.d_v, DType::kF32, {rows, kv_heads, head_dim})
                      .status());
  const auto& plan = *static_cast<const CpuBatchPlan*>(p.plan);
  if (plan.max_context_block() >= 0 && p.d_context.k.present()) {
    const int64_t* s = p.context.k.shape;
    RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                        .Dense("d_context.k", p.d_context.k, DType::kF32, {s[0], s[1], s[2], s[3]})
                        .Dense("d_context.v", p.d_context.v, DType::kF32, {s[0], s[1], s[2], s[3]})
                        .status());
  }
  ParallelFor(context.num_threads(), kv_heads, [&](int64_t kv_head, int) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < head_dim; ++d) {
        p.d_k.f32()[i * p.d_k.stride[0] + kv_head * p.d_k.stride[1] + d] = 0;
        p.d_v.f32()[i * p.d_v.stride[0] + kv_head * p.d_v.stride[1] + d] = 0;
      }
    }
    for (const TreeNode& node : plan.nodes()) {
      const auto keys = PathPointers(plan, node, p.k, p.context.k, kv_head);
      const auto values = PathPointers(plan, node, p.v, p.context.v, kv_head);
      const bool to_context = p.d_context.k.present();
      const auto d_keys = PathPointers(plan, node, p.d_k, p.d_context.k, kv_head);
      const auto d_values = PathPointers(plan, node, p.d_v, p.d_context.v, kv_head);
      const int64_t context_length = node.path.empty() ? 0 : [&] {
        int64_t n = 0;
        for (const KeyRun& run : node.path) n += run.row < 0 ? run.num_tokens : 0;
        return n;
      }();
      for (int64_t row = node.row_begin; row < node.row_end; ++row) {
        for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
          const float* q = p.q.f32() + row * p.q.stride[0] + h * p.q.stride[1];
          const float* out = p.out.f32() + row * p.out.stride[0] + h * p.out.stride[1];
          const float* d_out = p.d_out.f32() + row * p.d_out.stride[0] + h * p.d_out.stride[1];
          float* d_q = p.d_q.f32() + row * p.d_q.stride[0] + h * p.d_q.stride[1];
          const float lse = p.lse.f32()[row * p.lse.stride[0] + h];
          float delta = 0;
          for (int64_t d = 0; d < head_dim; ++d) delta += out[d] * d_out[d];
          std::vector<float> d_q_sum(head_dim, 0.0f);
          for (int64_t j = 0; j <= plan.batch().positions[row]; ++j) {
            float dot = 0, d_p = 0;
            for (int64_t d = 0; d < head_dim; ++d) {
              dot += q[d] * keys[j][d];
              d_p += d_out[d] * values[j][d];
            }
            const float prob = std::exp(dot * p.scale - lse);
            const float d_s = prob * (d_p - delta) * p.scale;
            const bool store = j >= context_length || to_context;
            for (int64_t d = 0; d < head_dim; ++d) {
              d_q_sum[d] += d_s * keys[j][d];
              if (!store) continue;
              const_cast<float*>(d_keys[j])[d] += d_s * q[d];
              const_cast<float*>(d_values[j])[d] += prob * d_out[d];
            }
          }
          std::copy(d_q_sum.begin(), d_q_sum.end(), d_q);
        }
      }
    }
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
