// CudaOps: ops::Ops in bf16 or f16 with f32 sums on one GPU. Each op lives in the .cc of its family
// (checks, scratch) and the .cu of the same name (kernels, launchers); this class only forwards and
// owns what they share.
//
// Thread: one caller at a time. Work is queued on one stream; host outputs are valid on return,
// those of StartSample after Wait(). Determinism: equal shapes and inputs give equal bits on one
// kind of device. Errors: a device failure is INTERNAL and sticky.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/context.h"
#include "kernels/ops/ops.h"

namespace coppice::cuda {

class CudaOps final : public ops::Ops {
 public:
  // The first visible device. UNAVAILABLE without one.
  static absl::StatusOr<std::unique_ptr<Ops>> Create(const CudaOptions& options);

  ops::DeviceInfo Info() const override;
  absl::StatusOr<DeviceBuffer> Allocate(int64_t size_bytes, absl::string_view label) override;
  absl::Status Upload(const void* host, TensorView dst) override;
  absl::Status Download(TensorView src, void* host) override;
  absl::Status Copy(TensorView src, TensorView dst) override;
  absl::Status Zero(TensorView dst) override;
  absl::Status Synchronize() override;
  absl::StatusOr<std::unique_ptr<ops::Timeline>> CreateTimeline() override;

  absl::StatusOr<std::unique_ptr<ops::BatchPlan>> PlanBatch(const ops::TokenBatch& batch) override;

  absl::Status Embedding(const ops::EmbeddingParams& p) override;
  absl::Status GatherRows(const ops::GatherRowsParams& p) override;
  absl::Status RmsNorm(const ops::RmsNormParams& p) override;
  absl::Status MatMul(const ops::MatMulParams& p) override;
  absl::Status QkNormRope(const ops::QkNormRopeParams& p) override;
  absl::Status TreeAttention(const ops::TreeAttentionParams& p) override;
  absl::Status SwiGlu(const ops::SwiGluParams& p) override;
  absl::Status LogProbHead(const ops::LogProbHeadParams& p) override;
  absl::Status NormMatMul(const ops::NormMatMulParams& p) override;
  absl::Status MatMulSwiGlu(const ops::MatMulSwiGluParams& p) override;
  absl::Status NormSwiGlu(const ops::NormSwiGluParams& p) override;
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

  absl::StatusOr<std::unique_ptr<ops::PendingSample>> StartSample(
      const ops::SampleParams& p) override;
  absl::Status CopyBlocks(const ops::CopyBlocksParams& p) override;

  absl::StatusOr<double> SumSquares(TensorView x) override;
  absl::Status AdamW(const ops::AdamWParams& p) override;

 private:
  explicit CudaOps(std::unique_ptr<Context> context) : context_(std::move(context)) {}

  std::unique_ptr<Context> context_;
  ops::DeviceInfo info_;  // but for free_bytes
};

}  // namespace coppice::cuda
