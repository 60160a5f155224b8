// CpuOps: ops::Ops in fp32 on the cores of one machine; the readable twin of every other backend
// and their reference. Each op lives in the file of its family (norm.cc, attention.cc, ...); this
// class only forwards and owns what they share.
//
// Thread: one caller at a time; an op returns when its work is done, so Synchronize() has nothing
// to wait for. Determinism: the order of every sum is fixed by shapes, never by timing; equal
// inputs give equal bits.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cpu/context.h"
#include "kernels/ops/ops.h"

namespace coppice::cpu {

class CpuOps final : public ops::Ops {
 public:
  // threads: 0 = every core that this process may use. INVALID_ARGUMENT when negative.
  static absl::StatusOr<std::unique_ptr<Ops>> Create(int threads);

  ops::DeviceInfo Info() const override;
  absl::StatusOr<DeviceBuffer> Allocate(int64_t size_bytes, absl::string_view label) override;
  absl::Status Upload(const void* host, TensorView dst) override;
  absl::Status Download(TensorView src, void* host) override;
  absl::Status Copy(TensorView src, TensorView dst) override;
  absl::Status Zero(TensorView dst) override;
  absl::Status Synchronize() override { return absl::OkStatus(); }
  absl::StatusOr<std::unique_ptr<ops::Timeline>> CreateTimeline() override;  // wall time

  absl::StatusOr<std::unique_ptr<ops::BatchPlan>> PlanBatch(const ops::TokenBatch& batch) override;

  absl::Status Embedding(const ops::EmbeddingParams& p) override;
  absl::Status GatherRows(const ops::GatherRowsParams& p) override;
  absl::Status RmsNorm(const ops::RmsNormParams& p) override;
  absl::Status MatMul(const ops::MatMulParams& p) override;
  absl::Status QkNormRope(const ops::QkNormRopeParams& p) override;
  absl::Status TreeAttention(const ops::TreeAttentionParams& p) override;
  absl::Status SwiGlu(const ops::SwiGluParams& p) override;
  absl::Status LogProbHead(const ops::LogProbHeadParams& p) override;

  absl::Status EmbeddingBackward(const ops::EmbeddingBackwardParams& p) override;
  absl::Status ScatterAddRows(const ops::ScatterAddRowsParams& p) override;
  absl::Status RmsNormBackward(const ops::RmsNormBackwardParams& p) override;
  absl::Status SumRows(const ops::SumRowsParams& p) override;
  absl::Status QkNormRopeBackward(const ops::QkNormRopeBackwardParams& p) override;
  absl::Status TreeAttentionBackward(const ops::TreeAttentionBackwardParams& p) override;
  absl::Status SwiGluBackward(const ops::SwiGluBackwardParams& p) override;
  absl::Status LogProbHeadBackward(const ops::LogProbHeadBackwardParams& p) override;

  absl::StatusOr<std::unique_ptr<ops::PendingSample>> StartSample(
      const ops::SampleParams& p) override;
  absl::Status CopyBlocks(const ops::CopyBlocksParams& p) override;

  absl::StatusOr<double> SumSquares(TensorView x) override;
  absl::Status AdamW(const ops::AdamWParams& p) override;

 private:
  explicit CpuOps(int num_threads) : context_(num_threads) {}

  Context context_;
};

}  // namespace coppice::cpu
