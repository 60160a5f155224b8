// Per-head RMSNorm of q and k (Qwen3; norm.cc has the formula), then rotary positions (Su et al.
// 2021, "RoFormer") in the rotate-half form over all head_dim columns, then K and V into their
// slots. For the halves a, b of a head at position t:
//   (a, b) -> (a cos(t w) - b sin(t w),  b cos(t w) + a sin(t w))
// The transpose of a rotation is the rotation by the opposite angle, so backward first turns back,
// then goes through the norm.
#include <cmath>
#include <cstring>

#include "kernels/base/status_macros.h"
#include "kernels/cpu/attention_inputs.h"
#include "kernels/cpu/column_sums.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

float* Head(const TensorView& t, int64_t row, int64_t head) {
  return t.f32() + row * t.stride[0] + head * t.stride[1];
}

absl::Status CheckForward(const ops::QkNormRopeParams& p) {
  constexpr absl::string_view kOp = "qk_norm_rope";
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .That(p.plan != nullptr, "plan", "a batch plan", 0)
                      .Rank("q_in", p.q_in, 3)
                      .Rank("k_in", p.k_in, 3)
                      .Rank("rope", p.rope, 2)
                      .status());
  const CpuBatchPlan& plan = CpuPlan(p.plan);
  const int64_t rows = plan.batch().num_rows(), head_dim = p.q_in.dim(2);
  const int64_t q_heads = p.q_in.dim(1), kv_heads = p.k_in.dim(1);
  ops::ShapeCheck check(kOp);
  check.Tensor("q_in", p.q_in, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("k_in", p.k_in, DType::kF32, {rows, kv_heads, head_dim})
      .Optional("q_norm", p.q_norm, DType::kF32, {head_dim})
      .Optional("k_norm", p.k_norm, DType::kF32, {head_dim})
      .Tensor("rope", p.rope, DType::kF32, {p.rope.dim(0), head_dim})
      .Tensor("q_out", p.q_out, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("k_out", p.k_out, DType::kF32, {rows, kv_heads, head_dim})
      .That(head_dim % 2 == 0, "head_dim", "an even number", head_dim)
      .That(plan.max_position() < p.rope.dim(0), "position", "below the rows of rope",
            plan.max_position());
  if (!p.pages.k.present() || plan.max_kv_slot() < 0) return check.status();
  const int64_t blocks = p.pages.k.dim(0), block_tokens = plan.batch().block_tokens;
  return check.Tensor("v", p.v, DType::kF32, {rows, kv_heads, head_dim})
      .Dense("pages.k", p.pages.k, DType::kF32, {blocks, block_tokens, kv_heads, head_dim})
      .Dense("pages.v", p.pages.v, DType::kF32, {blocks, block_tokens, kv_heads, head_dim})
      .That(plan.max_kv_slot() < blocks * block_tokens, "kv slot", "below the slots of the pool",
            plan.max_kv_slot())
      .status();
}

absl::Status CheckBackward(const ops::QkNormRopeBackwardParams& p) {
  constexpr absl::string_view kOp = "qk_norm_rope_backward";
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .That(p.plan != nullptr, "plan", "a batch plan", 0)
                      .Rank("d_q_out", p.d_q_out, 3)
                      .Rank("d_k_out", p.d_k_out, 3)
                      .Rank("rope", p.rope, 2)
                      .status());
  const CpuBatchPlan& plan = CpuPlan(p.plan);
  const int64_t rows = plan.batch().num_rows(), head_dim = p.d_q_out.dim(2);
  const int64_t q_heads = p.d_q_out.dim(1), kv_heads = p.d_k_out.dim(1);
  ops::ShapeCheck check(kOp);
  check.Tensor("d_q_out", p.d_q_out, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("d_k_out", p.d_k_out, DType::kF32, {rows, kv_heads, head_dim})
      .Tensor("d_q_in", p.d_q_in, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("d_k_in", p.d_k_in, DType::kF32, {rows, kv_heads, head_dim})
      .Tensor("rope", p.rope, DType::kF32, {p.rope.dim(0), head_dim})
      .Optional("q_norm", p.q_norm, DType::kF32, {head_dim})
      .Optional("k_norm", p.k_norm, DType::kF32, {head_dim})
      .That(head_dim % 2 == 0, "head_dim", "an even number", head_dim)
      .That(plan.max_position() < p.rope.dim(0), "position", "below the rows of rope",
            plan.max_position());
  if (p.q_norm.present()) {
    check.Tensor("q_in", p.q_in, DType::kF32, {rows, q_heads, head_dim})
        .Tensor("d_q_norm", p.d_q_norm, DType::kF32, {head_dim});
  }
  if (p.k_norm.present()) {
    check.Tensor("k_in", p.k_in, DType::kF32, {rows, kv_heads, head_dim})
        .Tensor("d_k_norm", p.d_k_norm, DType::kF32, {head_dim});
  }
  return check.status();
}

// Norm and rotation of all heads of one row.
void RotateRow(const TensorView& in, const TensorView& norm, float eps, const float* cos_sin,
               int64_t row, const TensorView& out) {
  const int64_t head_dim = in.dim(2);
  for (int64_t h = 0; h < in.dim(1); ++h) {
    const float* x = Head(in, row, h);
    float* y = Head(out, row, h);
    if (norm.present()) {
      SimdKernels().rms_norm(x, norm.f32(), eps, y, head_dim);
      x = y;
    }
    SimdKernels().rotate_half(x, cos_sin, 1.0f, y, head_dim / 2);
  }
}

// Copies the heads of one row to its slot of a page tensor.
void StoreRow(const TensorView& src, int64_t row, const TensorView& pages, int64_t slot) {
  const int64_t head_dim = src.dim(2);
  float* dst = pages.f32() + slot * src.dim(1) * head_dim;
  for (int64_t h = 0; h < src.dim(1); ++h) {
    std::memcpy(dst + h * head_dim, Head(src, row, h), head_dim * sizeof(float));
  }
}

struct BackwardSide {  // q or k
  TensorView d_out, in, norm, d_in;
};

float Rstd(const float* x, int64_t n, float eps) {
  const double mean = SimdKernels().sum_squares(x, n) / static_cast<double>(n);
  return static_cast<float>(1.0 / std::sqrt(mean + eps));
}

void BackwardRow(const BackwardSide& s, float eps, const float* cos_sin, int64_t row,
                 float* d_norm) {
  const int64_t head_dim = s.d_out.dim(2);
  for (int64_t h = 0; h < s.d_out.dim(1); ++h) {
    float* d_in = Head(s.d_in, row, h);
    SimdKernels().rotate_half(Head(s.d_out, row, h), cos_sin, -1.0f, d_in, head_dim / 2);
    if (!s.norm.present()) continue;
    const float* x = Head(s.in, row, h);
    SimdKernels().rms_norm_backward(d_in, x, s.norm.f32(), Rstd(x, head_dim, eps), false, d_in,
                                    d_norm, nullptr, head_dim);
  }
}

}  // namespace

absl::Status QkNormRope(Context& context, const ops::QkNormRopeParams& p) {
  RETURN_IF_ERROR(CheckForward(p));
  const ops::TokenBatch& batch = p.plan->batch();
  const bool stores = p.pages.k.present() && !batch.kv_slots.empty();
  ParallelRanges(context, batch.num_rows(), kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* cos_sin = p.rope.f32() + batch.positions[i] * p.rope.stride[0];
      RotateRow(p.q_in, p.q_norm, p.eps, cos_sin, i, p.q_out);
      RotateRow(p.k_in, p.k_norm, p.eps, cos_sin, i, p.k_out);
      if (!stores || batch.kv_slots[i] < 0) continue;
      StoreRow(p.k_out, i, p.pages.k, batch.kv_slots[i]);
      StoreRow(p.v, i, p.pages.v, batch.kv_slots[i]);
    }
  });
  return absl::OkStatus();
}

absl::Status QkNormRopeBackward(Context& context, const ops::QkNormRopeBackwardParams& p) {
  RETURN_IF_ERROR(CheckBackward(p));
  const ops::TokenBatch& batch = p.plan->batch();
  const BackwardSide q = {p.d_q_out, p.q_in, p.q_norm, p.d_q_in};
  const BackwardSide k = {p.d_k_out, p.k_in, p.k_norm, p.d_k_in};
  for (const auto& [side, d_norm] : {std::pair(q, p.d_q_norm), std::pair(k, p.d_k_norm)}) {
    const int64_t norm_width = side.norm.present() ? side.norm.dim(0) : 0;
    SumOverRows(context, batch.num_rows(), norm_width, d_norm.f32(),
                [&, s = side](int64_t begin, int64_t end, float* partial) {
                  for (int64_t i = begin; i < end; ++i) {
                    const float* cos_sin = p.rope.f32() + batch.positions[i] * p.rope.stride[0];
                    BackwardRow(s, p.eps, cos_sin, i, partial);
                  }
                });
  }
  return absl::OkStatus();
}

}  // namespace coppice::cpu
