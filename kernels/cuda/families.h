// The op families, one function per method of ops::Ops and one file per family. Each checks its
// tensors, then computes. Errors: INVALID_ARGUMENT naming op, tensor, want and got; nothing is
// written then.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/context.h"
#include "kernels/ops/ops.h"
#include "kernels/ops/params.h"

namespace coppice::cuda {

// Of dS that TreeAttentionBackward keeps at a time, of all heads; a quarter if it is lent no
// memory.
inline constexpr int64_t kRoundScoresBytes = int64_t{9} << 30;

// memory.cc
absl::Status Copy(Context& context, TensorView src, TensorView dst);
absl::Status CopyBlocks(Context& context, const ops::CopyBlocksParams& p);

// embedding.cc
absl::Status Embedding(Context& context, const ops::EmbeddingParams& p);
absl::Status EmbeddingBackward(Context& context, const ops::EmbeddingBackwardParams& p);
absl::Status GatherRows(Context& context, const ops::GatherRowsParams& p);
absl::Status ScatterAddRows(Context& context, const ops::ScatterAddRowsParams& p);

// norm.cc
absl::Status RmsNorm(Context& context, const ops::RmsNormParams& p);
absl::Status RmsNormBackward(Context& context, const ops::RmsNormBackwardParams& p);

// matmul.cc
absl::Status MatMul(Context& context, const ops::MatMulParams& p);
absl::Status SumRows(Context& context, const ops::SumRowsParams& p);

// skinny_matmul.cc: products of at most kMaxSkinnyRows rows. REQUIRES: FitsSkinny, which is true
// where shapes, strides, memory and the device suit, and the context is not deterministic.
bool FitsSkinny(const Context& context, const ops::MatMulParams& p);
bool FitsSkinny(const Context& context, const ops::NormMatMulParams& p);
bool FitsSkinny(const Context& context, const ops::NormSwiGluParams& p);
absl::Status SkinnyMatMul(Context& context, const ops::MatMulParams& p);
absl::Status SkinnyNormMatMul(Context& context, const ops::NormMatMulParams& p);
absl::Status SkinnyNormSwiGlu(Context& context, const ops::NormSwiGluParams& p);

// gated_matmul.cc: products of many rows with SwiGLU as their epilogue.
// REQUIRES: FitsGated, which is true where shapes, strides, memory and the device suit, and the
// context is not deterministic.
bool FitsGated(const Context& context, const ops::MatMulSwiGluParams& p);
bool FitsGated(const Context& context, const ops::MatMulSwiGluBackwardParams& p);
absl::Status GatedMatMul(Context& context, const ops::MatMulSwiGluParams& p);
absl::Status GatedMatMulBackward(Context& context, const ops::MatMulSwiGluBackwardParams& p);

// layer_chain.cc: the products from one attention to the next for few rows. REQUIRES: FitsChain,
// which is true where shapes, strides, memory and the device suit, and the context is not
// deterministic.
bool FitsChain(const Context& context, const ops::MlpBlockParams& p);
// Whether LayerChain rotates in its kernel; else QkNormRope's follows.
bool FitsRotation(const ops::MlpBlockParams& p);
absl::Status LayerChain(Context& context, const ops::MlpBlockParams& p);

// rope.cc
absl::Status CheckQkNormRope(const Context& context, const ops::QkNormRopeParams& p);
absl::Status QkNormRope(Context& context, const ops::QkNormRopeParams& p);
absl::Status QkNormRopeBackward(Context& context, const ops::QkNormRopeBackwardParams& p);

// attention.cc
absl::Status TreeAttention(Context& context, const ops::TreeAttentionParams& p);
absl::Status TreeAttentionBackward(Context& context, const ops::TreeAttentionBackwardParams& p);

// activation.cc
absl::Status SwiGlu(Context& context, const ops::SwiGluParams& p);
absl::Status SwiGluBackward(Context& context, const ops::SwiGluBackwardParams& p);

// logprob_head.cc
absl::Status LogProbHead(Context& context, const ops::LogProbHeadParams& p);
absl::Status LogProbHeadBackward(Context& context, const ops::LogProbHeadBackwardParams& p);

// sampling.cc
absl::StatusOr<std::unique_ptr<ops::PendingSample>> StartSample(Context& context,
                                                                const ops::SampleParams& p);

// adamw.cc
absl::StatusOr<double> SumSquares(Context& context, TensorView x);
absl::Status AdamW(Context& context, const ops::AdamWParams& p);

}  // namespace coppice::cuda
