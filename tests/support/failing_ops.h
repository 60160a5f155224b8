// FailingOps: a device that breaks. Forwards everything to another Ops until told to fail; from
// then on PlanBatch, the first call of every batch, returns INTERNAL, and keeps doing so. Memory
// and uploads can be made to fail by themselves, attention to be unknown. What is lent as workspace
// is spoilt, what the head is lent must stay, gate and up that nobody keeps are spoilt. Rows are
// counted.
#pragma once

#include <atomic>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/ops/ops.h"

namespace coppice {

class FailingOps : public ops::Ops {
 public:
  explicit FailingOps(std::unique_ptr<ops::Ops> inner) : inner_(std::move(inner)) {}

  void Fail() { failing_ = true; }                   // any thread
  void FailAllocations() { out_of_memory_ = true; }  // RESOURCE_EXHAUSTED from now on
  void AllowAllocations() {
    out_of_memory_ = false;
    limit_bytes_ = std::numeric_limits<int64_t>::max();
  }
  // RESOURCE_EXHAUSTED where more than this would be held beside what is held now.
  void LimitAllocations(int64_t budget_bytes) { limit_bytes_ = *held_bytes_ + budget_bytes; }
  void LackAttention() { lacks_attention_ = true; }  // UNIMPLEMENTED, as for a shape unknown to it
  void FailUploadsAfter(int uploads) { uploads_left_ = uploads; }  // INTERNAL after so many more

  void WantWorkspace(int64_t score_bytes, int64_t scores_head_dim = 0) {
    score_bytes_ = score_bytes;
    scores_head_dim_ = scores_head_dim;
  }

  absl::StatusOr<std::unique_ptr<ops::BatchPlan>> PlanBatch(const ops::TokenBatch& batch) override {
    if (failing_) return absl::InternalError("device: lost");
    return inner_->PlanBatch(batch);
  }

  ops::DeviceInfo Info() const override {
    ops::DeviceInfo info = inner_->Info();
    info.score_bytes = score_bytes_;
    info.scores_head_dim = scores_head_dim_;
    return info;
  }
  absl::StatusOr<DeviceBuffer> Allocate(int64_t size_bytes, absl::string_view label) override {
    if (out_of_memory_) return absl::ResourceExhaustedError("device: out of memory");
    if (*held_bytes_ + size_bytes > limit_bytes_) {
      return absl::ResourceExhaustedError("device: beyond the limit");
    }
    absl::StatusOr<DeviceBuffer> inner = inner_->Allocate(size_bytes, label);
    if (!inner.ok()) return inner;
    *held_bytes_ += size_bytes;
    auto owned = std::make_shared<DeviceBuffer>(std::move(inner).value());
    void* data = owned->data();
    return DeviceBuffer(data, size_bytes, [owned, held = held_bytes_, size_bytes](void*) mutable {
      owned.reset();
      *held -= size_bytes;
    });
  }
  absl::Status Upload(const void* host, TensorView dst) override {
    if (uploads_left_-- == 0) {
      uploads_left_ = 0;
      return absl::InternalError("device: lost");
    }
    return inner_->Upload(host, dst);
  }
  absl::Status Download(TensorView src, void* host) override { return inner_->Download(src, host); }
  absl::Status Copy(TensorView src, TensorView dst) override { return inner_->Copy(src, dst); }
  absl::Status Zero(TensorView dst) override { return inner_->Zero(dst); }
  absl::Status Synchronize() override { return inner_->Synchronize(); }
  absl::StatusOr<std::unique_ptr<ops::Timeline>> CreateTimeline() override {
    return inner_->CreateTimeline();
  }
  absl::StatusOr<double> SumSquares(TensorView x) override { return inner_->SumSquares(x); }

  absl::StatusOr<std::unique_ptr<ops::PendingSample>> StartSample(
      const ops::SampleParams& p) override {
    return inner_->StartSample(p);
  }

#define COPPICE_FORWARD(Op) \
  absl::Status Op(const ops::Op##Params& p) override { return inner_->Op(p); }
  COPPICE_FORWARD(Embedding)
  COPPICE_FORWARD(GatherRows)
  COPPICE_FORWARD(RmsNorm)
  COPPICE_FORWARD(MatMul)
  COPPICE_FORWARD(QkNormRope)
  COPPICE_FORWARD(SwiGlu)
  COPPICE_FORWARD(EmbeddingBackward)
  COPPICE_FORWARD(ScatterAddRows)
  COPPICE_FORWARD(RmsNormBackward)
  COPPICE_FORWARD(SumRows)
  COPPICE_FORWARD(QkNormRopeBackward)
  COPPICE_FORWARD(SwiGluBackward)
  COPPICE_FORWARD(CopyBlocks)
  COPPICE_FORWARD(AdamW)
#undef COPPICE_FORWARD
  static constexpr uint8_t kNan = 0xff;   // of every byte of what is spoilt
  static constexpr uint8_t kKept = 0x6b;  // of every byte that the head is lent
  absl::Status LogProbHead(const ops::LogProbHeadParams& p) override {
    lent_ = p.kept;
    lent_bytes_ += lent_.num_elements();
    RETURN_IF_ERROR(FillBytes(lent_, kKept));
    RETURN_IF_ERROR(inner_->LogProbHead(p));
    return ReadBytes(lent_, kept_);
  }
  absl::Status LogProbHeadBackward(const ops::LogProbHeadBackwardParams& p) override {
    const bool same = lent_.num_elements() == p.kept.num_elements() &&
                      (p.kept.num_elements() == 0 || lent_.data == p.kept.data);
    if (!same) return absl::InternalError("the head is not given what it was lent");
    lent_ = {};
    const std::vector<uint8_t> left = std::exchange(kept_, {});
    std::vector<uint8_t> kept;
    RETURN_IF_ERROR(ReadBytes(p.kept, kept));
    if (kept != left)
      return absl::InternalError("the head's memory was touched between its passes");
    return inner_->LogProbHeadBackward(p);
  }
  absl::Status MatMulSwiGlu(const ops::MatMulSwiGluParams& p) override {
    RETURN_IF_ERROR(inner_->MatMulSwiGlu(p));
    if (p.keep_gate_up) {
      kept_gate_ups_ += p.gate_up.dim(0);
      return absl::OkStatus();
    }
    for (int64_t row = 0; row < p.gate_up.dim(0); ++row) {
      RETURN_IF_ERROR(FillBytes(p.gate_up.Rows(row, row + 1), kNan));
    }
    return absl::OkStatus();
  }
  int64_t lent_bytes() const { return lent_bytes_; }        // to the head, by every call so far
  int64_t kept_gate_ups() const { return kept_gate_ups_; }  // rows of them, of every call so far
  absl::Status TreeAttention(const ops::TreeAttentionParams& p) override {
    if (lacks_attention_) return absl::UnimplementedError("device: no attention of this head_dim");
    attended_rows_ += p.q.dim(0);
    return inner_->TreeAttention(p);
  }
  int64_t attended_rows() const { return attended_rows_; }  // of every call so far
  absl::Status TreeAttentionBackward(const ops::TreeAttentionBackwardParams& p) override {
    RETURN_IF_ERROR(FillBytes(p.workspace, kNan));
    return inner_->TreeAttentionBackward(p);
  }

 private:
  // Of what may be a GPU's memory.
  absl::Status FillBytes(const TensorView& t, uint8_t byte) {
    if (t.num_elements() == 0) return absl::OkStatus();
    const std::vector<uint8_t> bytes(t.num_bytes(), byte);
    RETURN_IF_ERROR(inner_->Upload(bytes.data(), t));
    return inner_->Synchronize();
  }
  absl::Status ReadBytes(const TensorView& t, std::vector<uint8_t>& bytes) {
    bytes.resize(t.num_bytes());
    return bytes.empty() ? absl::OkStatus() : inner_->Download(t, bytes.data());
  }

  std::unique_ptr<ops::Ops> inner_;
  std::atomic<bool> failing_{false};
  bool out_of_memory_ = false, lacks_attention_ = false;
  // Shared with the buffers, which may outlive this.
  std::shared_ptr<std::atomic<int64_t>> held_bytes_ = std::make_shared<std::atomic<int64_t>>(0);
  int64_t limit_bytes_ = std::numeric_limits<int64_t>::max();
  int64_t score_bytes_ = 0, scores_head_dim_ = 0;
  TensorView lent_;            // to the head's forward, until its backward
  std::vector<uint8_t> kept_;  // what forward left there
  int64_t attended_rows_ = 0, kept_gate_ups_ = 0, lent_bytes_ = 0;
  int64_t uploads_left_ = std::numeric_limits<int64_t>::max();
};

}  // namespace coppice
