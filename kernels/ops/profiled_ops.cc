#include "kernels/ops/profiled_ops.h"

#include <algorithm>

#include "kernels/base/status_macros.h"

namespace coppice::ops {

const char* Name(OpFamily family) {
  static constexpr const char* kNames[kNumOpFamilies] = {
      "matmul", "attention", "attention_backward", "norm",
      "rope",   "swiglu",    "gated_matmul",       "head",
      "rows",   "memory",    "gradient_norm",      "adamw",
      "other"};
  return kNames[static_cast<int>(family)];
}

absl::StatusOr<std::unique_ptr<ProfiledOps>> ProfiledOps::Create(std::unique_ptr<Ops> inner) {
  std::unique_ptr<ProfiledOps> ops(new ProfiledOps(std::move(inner)));
  ASSIGN_OR_RETURN(ops->timeline_, ops->inner_->CreateTimeline());
  return ops;
}

absl::StatusOr<OpProfile> ProfiledOps::Take() {
  ASSIGN_OR_RETURN(const std::vector<double> marks, timeline_->Take());
  OpProfile profile;
  for (size_t i = 0; i < calls_.size(); ++i) {
    const double start = marks[2 * i], end = marks[2 * i + 1];
    OpProfile::Entry& entry = profile.families[static_cast<int>(calls_[i])];
    ++entry.calls;
    entry.seconds += end - start;
    entry.longest_seconds = std::max(entry.longest_seconds, end - start);
    if (i > 0) profile.gap_seconds += start - marks[2 * i - 1];
  }
  if (!marks.empty()) profile.total_seconds = marks.back() - marks.front();
  calls_.clear();
  return profile;
}

// A failed mark fails the op: half a profile is none.
template <typename Op>
auto ProfiledOps::Timed(OpFamily family, const Op& op) {
  using Result = decltype(op());
  if (absl::Status mark = timeline_->Mark(); !mark.ok()) return Result(std::move(mark));
  Result result = op();
  if (absl::Status mark = timeline_->Mark(); !mark.ok()) return Result(std::move(mark));
  calls_.push_back(family);
  return result;
}

absl::Status ProfiledOps::Upload(const void* host, TensorView dst) {
  return Timed(OpFamily::kMemory, [&] { return inner_->Upload(host, dst); });
}
absl::Status ProfiledOps::Download(TensorView src, void* host) {
  return Timed(OpFamily::kMemory, [&] { return inner_->Download(src, host); });
}
absl::Status ProfiledOps::Copy(TensorView src, TensorView dst) {
  return Timed(OpFamily::kMemory, [&] { return inner_->Copy(src, dst); });
}
absl::Status ProfiledOps::Zero(TensorView dst) {
  return Timed(OpFamily::kMemory, [&] { return inner_->Zero(dst); });
}
absl::Status ProfiledOps::Embedding(const EmbeddingParams& p) {
  return Timed(OpFamily::kRows, [&] { return inner_->Embedding(p); });
}
absl::Status ProfiledOps::GatherRows(const GatherRowsParams& p) {
  return Timed(OpFamily::kRows, [&] { return inner_->GatherRows(p); });
}
absl::Status ProfiledOps::RmsNorm(const RmsNormParams& p) {
  return Timed(OpFamily::kNorm, [&] { return inner_->RmsNorm(p); });
}
absl::Status ProfiledOps::MatMul(const MatMulParams& p) {
  return Timed(OpFamily::kMatMul, [&] { return inner_->MatMul(p); });
}
absl::Status ProfiledOps::QkNormRope(const QkNormRopeParams& p) {
  return Timed(OpFamily::kRope, [&] { return inner_->QkNormRope(p); });
}
absl::Status ProfiledOps::TreeAttention(const TreeAttentionParams& p) {
  return Timed(OpFamily::kAttention, [&] { return inner_->TreeAttention(p); });
}
absl::Status ProfiledOps::SwiGlu(const SwiGluParams& p) {
  return Timed(OpFamily::kSwiGlu, [&] { return inner_->SwiGlu(p); });
}
absl::Status ProfiledOps::LogProbHead(const LogProbHeadParams& p) {
  return Timed(OpFamily::kHead, [&] { return inner_->LogProbHead(p); });
}
absl::Status ProfiledOps::EmbeddingBackward(const EmbeddingBackwardParams& p) {
  return Timed(OpFamily::kRows, [&] { return inner_->EmbeddingBackward(p); });
}
absl::Status ProfiledOps::ScatterAddRows(const ScatterAddRowsParams& p) {
  return Timed(OpFamily::kRows, [&] { return inner_->ScatterAddRows(p); });
}
absl::Status ProfiledOps::RmsNormBackward(const RmsNormBackwardParams& p) {
  return Timed(OpFamily::kNorm, [&] { return inner_->RmsNormBackward(p); });
}
absl::Status ProfiledOps::SumRows(const SumRowsParams& p) {
  return Timed(OpFamily::kRows, [&] { return inner_->SumRows(p); });
}
absl::Status ProfiledOps::QkNormRopeBackward(const QkNormRopeBackwardParams& p) {
  return Timed(OpFamily::kRope, [&] { return inner_->QkNormRopeBackward(p); });
}
absl::Status ProfiledOps::TreeAttentionBackward(const TreeAttentionBackwardParams& p) {
  return Timed(OpFamily::kAttentionBackward, [&] { return inner_->TreeAttentionBackward(p); });
}
absl::Status ProfiledOps::SwiGluBackward(const SwiGluBackwardParams& p) {
  return Timed(OpFamily::kSwiGlu, [&] { return inner_->SwiGluBackward(p); });
}
absl::Status ProfiledOps::MatMulSwiGlu(const MatMulSwiGluParams& p) {
  return Timed(OpFamily::kGatedMatMul, [&] { return inner_->MatMulSwiGlu(p); });
}
absl::Status ProfiledOps::MatMulSwiGluBackward(const MatMulSwiGluBackwardParams& p) {
  return Timed(OpFamily::kGatedMatMul, [&] { return inner_->MatMulSwiGluBackward(p); });
}
absl::Status ProfiledOps::LogProbHeadBackward(const LogProbHeadBackwardParams& p) {
  return Timed(OpFamily::kHead, [&] { return inner_->LogProbHeadBackward(p); });
}
absl::StatusOr<std::unique_ptr<PendingSample>> ProfiledOps::StartSample(const SampleParams& p) {
  return Timed(OpFamily::kOther, [&] { return inner_->StartSample(p); });
}
absl::Status ProfiledOps::CopyBlocks(const CopyBlocksParams& p) {
  return Timed(OpFamily::kMemory, [&] { return inner_->CopyBlocks(p); });
}
absl::StatusOr<double> ProfiledOps::SumSquares(TensorView x) {
  return Timed(OpFamily::kGradientNorm, [&] { return inner_->SumSquares(x); });
}
absl::Status ProfiledOps::AdamW(const AdamWParams& p) {
  return Timed(OpFamily::kAdamW, [&] { return inner_->AdamW(p); });
}

}  // namespace coppice::ops
