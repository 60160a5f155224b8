// The language-model head with log-probs, without ever holding all logits: tiles of kTileRows rows
// by kTileVocab tokens are computed by GEMM and folded at once. With z = hidden W^T / temperature:
//   lse = log sum_j exp(z_j),   logprob[t] = z[target t] - lse,   entropy = lse - sum_j p_j z_j
// (online softmax: Milakov & Gimelshein 2018). Backward computes each tile again; its gradient
// replaces it:
//   dL/dz_j = sum_t c[t] (1[j = target t] - p_j) - e p_j (log p_j + entropy),
// then d_hidden += dz W and d_weight += dz^T hidden.
// Cost: one GEMM forward, three backward; a tile of 4 MiB stays in the L2/L3 cache between its
// passes.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

constexpr int64_t kTileRows = 256;
constexpr int64_t kTileVocab = 4096;

absl::Status CheckTargets(absl::string_view op, const TensorView& indptr, const TensorView& targets,
                          int64_t head_rows, int64_t vocab) {
  const int32_t* begin = indptr.i32();
  for (int64_t r = 0; r < head_rows; ++r) {
    if (begin[r] > begin[r + 1]) {
      return ops::ShapeCheck(op)
          .That(false, "target_indptr", "ascending values", begin[r + 1])
          .status();
    }
  }
  if (begin[0] != 0 || begin[head_rows] != targets.dim(0)) {
    return ops::ShapeCheck(op)
        .That(false, "target_indptr", absl::StrCat("0 to ", targets.dim(0)), begin[head_rows])
        .status();
  }
  for (int64_t t = 0; t < targets.dim(0); ++t) {
    const int32_t id = targets.i32()[t];
    if (id < 0 || id >= vocab) {
      return ops::ShapeCheck(op)
          .That(false, "targets", absl::StrCat("an id in [0, ", vocab, ")"), id)
          .status();
    }
  }
  return absl::OkStatus();
}

// One tile: logits of rows [row, row + rows) for tokens [token, token + tokens).
struct Tile {
  int64_t row, rows, token, tokens;
  float* logits;  // [rows, tokens]
};

// Calls fn(tile) for all tiles, row tiles outermost; `tile.logits` holds hidden W^T.
template <typename Fn>
absl::Status ForTiles(Context& context, const TensorView& hidden, const TensorView& weight,
                      const Fn& fn) {
  const int64_t head_rows = hidden.dim(0), vocab = weight.dim(0);
  float* logits = context.Scratch(std::min(kTileRows, head_rows) * std::min(kTileVocab, vocab));
  for (int64_t row = 0; row < head_rows; row += kTileRows) {
    for (int64_t token = 0; token < vocab; token += kTileVocab) {
      const Tile tile = {row, std::min(kTileRows, head_rows - row), token,
                         std::min(kTileVocab, vocab - token), logits};
      RETURN_IF_ERROR(Gemm(context, {.trans_b = true,
                                     .m = tile.rows,
                                     .n = tile.tokens,
                                     .k = hidden.dim(1),
                                     .a = hidden.f32() + row * hidden.stride[0],
                                     .a_row = hidden.stride[0],
                                     .b = weight.f32() + token * weight.stride[0],
                                     .b_row = weight.stride[0],
                                     .c = logits,
                                     .c_row = tile.tokens}));
      RETURN_IF_ERROR(fn(tile));
    }
  }
  return absl::OkStatus();
}

// Calls fn(t, column) for the targets of `row` that lie in the tile.
template <typename Fn>
void ForTargets(const TensorView& indptr, const TensorView& targets, int64_t row, const Tile& tile,
                const Fn& fn) {
  for (int32_t t = indptr.i32()[row]; t < indptr.i32()[row + 1]; ++t) {
    const int64_t column = targets.i32()[t] - tile.token;
    if (column >= 0 && column < tile.tokens) fn(t, column);
  }
}

}  // namespace

absl::Status LogProbHead(Context& context, const ops::LogProbHeadParams& p) {
  constexpr absl::string_view kOp = "logprob_head";
  const int64_t head_rows = p.hidden.dim(0), hidden = p.hidden.dim(1), vocab = p.weight.dim(0);
  const int64_t num_targets = p.targets.dim(0);
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .Tensor("hidden", p.hidden, DType::kF32, {head_rows, hidden})
                      .Tensor("weight", p.weight, DType::kF32, {vocab, hidden})
                      .Tensor("target_indptr", p.target_indptr, DType::kI32, {head_rows + 1})
                      .Tensor("targets", p.targets, DType::kI32, {num_targets})
                      .Tensor("logprobs", p.logprobs, DType::kF32, {num_targets})
                      .Tensor("entropy", p.entropy, DType::kF32, {head_rows})
                      .Tensor("lse", p.lse, DType::kF32, {head_rows})
                      .That(p.temperature > 0, "temperature", "a positive number",
                            static_cast<int64_t>(p.temperature))
                      .status());
  RETURN_IF_ERROR(CheckTargets(kOp, p.target_indptr, p.targets, head_rows, vocab));
  const float scale = 1.0f / p.temperature;
  std::vector<SoftmaxStats> stats(head_rows, {-std::numeric_limits<float>::infinity(), 0, 0});
  RETURN_IF_ERROR(ForTiles(context, p.hidden, p.weight, [&](const Tile& tile) {
    ParallelFor(context, tile.rows, [&](int64_t i, int) {
      const float* logits = tile.logits + i * tile.tokens;
      SimdKernels().softmax_stats(logits, scale, &stats[tile.row + i], tile.tokens);
      ForTargets(p.target_indptr, p.targets, tile.row + i, tile,
                 [&](int32_t t, int64_t column) { p.logprobs.f32()[t] = logits[column] * scale; });
    });
    return absl::OkStatus();
  }));
  for (int64_t r = 0; r < head_rows; ++r) {
    const float log_sum = std::log(stats[r].sum);
    p.lse.f32()[r] = stats[r].max + log_sum;
    p.entropy.f32()[r] = log_sum - stats[r].weighted / stats[r].sum;
    for (int32_t t = p.target_indptr.i32()[r]; t < p.target_indptr.i32()[r + 1]; ++t) {
      p.logprobs.f32()[t] -= p.lse.f32()[r];
    }
  }
  return absl::OkStatus();
}

absl::Status LogProbHeadBackward(Context& context, const ops::LogProbHeadBackwardParams& p) {
  constexpr absl::string_view kOp = "logprob_head_backward";
  const int64_t head_rows = p.hidden.dim(0), hidden = p.hidden.dim(1), vocab = p.weight.dim(0);
  const int64_t num_targets = p.targets.dim(0);
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .Tensor("hidden", p.hidden, DType::kF32, {head_rows, hidden})
                      .Tensor("weight", p.weight, DType::kF32, {vocab, hidden})
                      .Tensor("target_indptr", p.target_indptr, DType::kI32, {head_rows + 1})
                      .Tensor("targets", p.targets, DType::kI32, {num_targets})
                      .Tensor("lse", p.lse, DType::kF32, {head_rows})
                      .Tensor("entropy", p.entropy, DType::kF32, {head_rows})
                      .Tensor("d_logprobs", p.d_logprobs, DType::kF32, {num_targets})
                      .Optional("d_entropy", p.d_entropy, DType::kF32, {head_rows})
                      .Tensor("d_hidden", p.d_hidden, DType::kF32, {head_rows, hidden})
                      .Tensor("d_weight", p.d_weight, DType::kF32, {vocab, hidden})
                      .That(p.temperature > 0, "temperature", "a positive number",
                            static_cast<int64_t>(p.temperature))
                      .status());
  RETURN_IF_ERROR(CheckTargets(kOp, p.target_indptr, p.targets, head_rows, vocab));
  const float scale = 1.0f / p.temperature;
  const auto logits_to_gradient = [&](const Tile& tile, int64_t i) {
    const int64_t r = tile.row + i;
    float* z = tile.logits + i * tile.tokens;
    float coef = 0;
    for (int32_t t = p.target_indptr.i32()[r]; t < p.target_indptr.i32()[r + 1]; ++t) {
      coef += p.d_logprobs.f32()[t];
    }
    const float d_entropy = p.d_entropy.present() ? p.d_entropy.f32()[r] : 0.0f;
    SimdKernels().softmax_backward(z, scale, p.lse.f32()[r], p.entropy.f32()[r], coef, d_entropy,
                                   tile.tokens);
    ForTargets(p.target_indptr, p.targets, r, tile,
               [&](int32_t t, int64_t column) { z[column] += scale * p.d_logprobs.f32()[t]; });
  };
  return ForTiles(context, p.hidden, p.weight, [&](const Tile& tile) -> absl::Status {
    ParallelFor(context, tile.rows, [&](int64_t i, int) { logits_to_gradient(tile, i); });
    const float* hidden_rows = p.hidden.f32() + tile.row * p.hidden.stride[0];
    RETURN_IF_ERROR(Gemm(context, {.m = tile.rows,
                                   .n = hidden,
                                   .k = tile.tokens,
                                   .a = tile.logits,
                                   .a_row = tile.tokens,
                                   .b = p.weight.f32() + tile.token * p.weight.stride[0],
                                   .b_row = p.weight.stride[0],
                                   .c = p.d_hidden.f32() + tile.row * p.d_hidden.stride[0],
                                   .c_row = p.d_hidden.stride[0],
                                   .accumulate = tile.token > 0}));
    return Gemm(context, {.trans_a = true,
                          .m = tile.tokens,
                          .n = hidden,
                          .k = tile.rows,
                          .a = tile.logits,
                          .a_row = tile.tokens,
                          .b = hidden_rows,
                          .b_row = p.hidden.stride[0],
                          .c = p.d_weight.f32() + tile.token * p.d_weight.stride[0],
                          .c_row = p.d_weight.stride[0],
                          .accumulate = tile.row > 0 || p.accumulate_d_weight});
  });
}

}  // namespace coppice::cpu
