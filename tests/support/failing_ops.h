// FailingOps: a device that breaks. Forwards everything to another Ops until told to fail; from
// then on PlanBatch, the first call of every batch, returns INTERNAL, and keeps doing so.
#pragma once

#include <memory>
#include <utility>

#include "kernels/ops/ops.h"

namespace coppice {

class FailingOps final : public ops::Ops {
 public:
  explicit FailingOps(std::unique_ptr<ops::Ops> inner) : inner_(std::move(inner)) {}

  void Fail() { failing_ = true; }

  absl::StatusOr<std::unique_ptr<ops::BatchPlan>> PlanBatch(const ops::TokenBatch& batch) override {
    if (failing_) return absl::InternalError("device: lost");
    return inner_->PlanBatch(batch);
  }

  ops::DeviceInfo Info() const override { return inner_->Info(); }
  absl::StatusOr<DeviceBuffer> Allocate(int64_t size_bytes, absl::string_view label) override {
    return inner_->Allocate(size_bytes, label);
  }
  absl::Status Upload(const void* host, TensorView dst) override {
    return inner_->Upload(host, dst);
  }
  absl::Status Download(TensorView src, void* host) override { return inner_->Download(src, host); }
  absl::Status Copy(TensorView src, TensorView dst) override { return inner_->Copy(src, dst); }
  absl::Status Zero(TensorView dst) override { return inner_->Zero(dst); }
  absl::Status Synchronize() override { return inner_->Synchronize(); }
  absl::StatusOr<double> SumSquares(TensorView x) override { return inner_->SumSquares(x); }

#define COPPICE_FORWARD(Op) \
  absl::Status Op(const ops::Op##Params& p) override { return inner_->Op(p); }
  COPPICE_FORWARD(Embedding)
  COPPICE_FORWARD(GatherRows)
  COPPICE_FORWARD(RmsNorm)
  COPPICE_FORWARD(MatMul)
  COPPICE_FORWARD(QkNormRope)
  COPPICE_FORWARD(TreeAttention)
  COPPICE_FORWARD(SwiGlu)
  COPPICE_FORWARD(LogProbHead)
  COPPICE_FORWARD(EmbeddingBackward)
  COPPICE_FORWARD(ScatterAddRows)
  COPPICE_FORWARD(RmsNormBackward)
  COPPICE_FORWARD(SumRows)
  COPPICE_FORWARD(QkNormRopeBackward)
  COPPICE_FORWARD(TreeAttentionBackward)
  COPPICE_FORWARD(SwiGluBackward)
  COPPICE_FORWARD(LogProbHeadBackward)
  COPPICE_FORWARD(Sample)
  COPPICE_FORWARD(CopyBlocks)
  COPPICE_FORWARD(AdamW)
#undef COPPICE_FORWARD

 private:
  std::unique_ptr<ops::Ops> inner_;
  bool failing_ = false;
};

}  // namespace coppice
