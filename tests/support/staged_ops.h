// StagedOps: runs the ops of a device on tensors in host memory, so that one test serves every
// backend. For each op it copies the tensors to the device (f32 becomes the device's compute type
// where params.h says f), with guard zones around them and between their rows, runs the op, copies
// the outputs back, and fails the op if anything outside a tensor has changed.
#pragma once

#include <memory>
#include <vector>

#include "kernels/ops/ops.h"

namespace coppice {

class StagedOps final : public ops::Ops {
 public:
  explicit StagedOps(std::unique_ptr<ops::Ops> device)
      : ops_(std::move(device)), residual_dtype_(ops_->Info().residual_dtype) {}

  ops::DeviceInfo Info() const override { return ops_->Info(); }
  // The type on the device of what params.h calls r; by default that of its residual stream.
  void set_residual_dtype(DType dtype) { residual_dtype_ = dtype; }
  absl::StatusOr<DeviceBuffer> Allocate(int64_t size_bytes, absl::string_view label) override {
    return ops_->Allocate(size_bytes, label);
  }
  absl::Status Upload(const void* host, TensorView dst) override { return ops_->Upload(host, dst); }
  absl::Status Download(TensorView src, void* host) override { return ops_->Download(src, host); }
  absl::Status Zero(TensorView dst) override { return ops_->Zero(dst); }
  absl::Status Synchronize() override { return ops_->Synchronize(); }
  absl::StatusOr<std::unique_ptr<ops::Timeline>> CreateTimeline() override {
    return ops_->CreateTimeline();
  }
  absl::StatusOr<std::unique_ptr<ops::BatchPlan>> PlanBatch(const ops::TokenBatch& b) override {
    return ops_->PlanBatch(b);
  }

  absl::Status Copy(TensorView src, TensorView dst) override;
  absl::Status Embedding(const ops::EmbeddingParams& p) override;
  absl::Status GatherRows(const ops::GatherRowsParams& p) override;
  absl::Status RmsNorm(const ops::RmsNormParams& p) override;
  // c in f32 as models have it: with trans_a (weight gradients) or an addend (the residual stream);
  // not with a bias.
  absl::Status MatMul(const ops::MatMulParams& p) override;
  absl::Status QkNormRope(const ops::QkNormRopeParams& p) override;
  absl::Status TreeAttention(const ops::TreeAttentionParams& p) override;
  absl::Status SwiGlu(const ops::SwiGluParams& p) override;
  absl::Status LogProbHead(const ops::LogProbHeadParams& p) override;
  absl::Status NormMatMul(const ops::NormMatMulParams& p) override;
  absl::Status MatMulSwiGlu(const ops::MatMulSwiGluParams& p) override;
  absl::Status NormSwiGlu(const ops::NormSwiGluParams& p) override;
  // With `rotate` in place.
  absl::Status MlpBlock(const ops::MlpBlockParams& p) override;
  absl::Status EmbeddingBackward(const ops::EmbeddingBackwardParams& p) override;
  absl::Status ScatterAddRows(const ops::ScatterAddRowsParams& p) override;
  absl::Status RmsNormBackward(const ops::RmsNormBackwardParams& p) override;
  absl::Status SumRows(const ops::SumRowsParams& p) override;
  absl::Status QkNormRopeBackward(const ops::QkNormRopeBackwardParams& p) override;
  absl::Status TreeAttentionBackward(const ops::TreeAttentionBackwardParams& p) override;
  absl::Status SwiGluBackward(const ops::SwiGluBackwardParams& p) override;
  absl::Status MatMulSwiGluBackward(const ops::MatMulSwiGluBackwardParams& p) override;
  absl::Status LogProbHeadBackward(const ops::LogProbHeadBackwardParams& p) override;
  // Done on return: the outputs are host memory for the caller.
  absl::StatusOr<std::unique_ptr<ops::PendingSample>> StartSample(
      const ops::SampleParams& p) override;
  absl::Status CopyBlocks(const ops::CopyBlocksParams& p) override;
  absl::StatusOr<double> SumSquares(TensorView x) override;
  absl::Status AdamW(const ops::AdamWParams& p) override;

 private:
  std::unique_ptr<ops::Ops> ops_;
  DType residual_dtype_;
};

}  // namespace coppice
