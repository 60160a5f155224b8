// ProfiledOps: another Ops with a mark on the device's timeline before and after every op, added up
// by family. What is not wrapped pays nothing.
//
// Thread and errors: those of Ops. Cost: two marks an op (CUDA: two events, about 2 us of host
// time).
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/ops/ops.h"

namespace coppice::ops {

enum class OpFamily {
  kMatMul,
  kAttention,
  kAttentionBackward,
  kNorm,  // RMSNorm, forward and backward
  kRope,  // with qk-norm
  kSwiGlu,
  kGatedMatMul,  // products with SwiGLU behind
  kHead,         // log-probs; its own products are among these
  kRows,         // embedding, gather, scatter, sums over rows
  kMemory,       // copies, zeroes, transfers
  kGradientNorm,
  kAdamW,
  kOther,
};
constexpr int kNumOpFamilies = static_cast<int>(OpFamily::kOther) + 1;
const char* Name(OpFamily family);

struct OpProfile {
  struct Entry {
    int64_t calls = 0;
    double seconds = 0;
    double longest_seconds = 0;  // of one call
  };
  std::array<Entry, kNumOpFamilies> families;
  double gap_seconds = 0;    // the device waited for the host
  double total_seconds = 0;  // from the first op's start to the last one's end
};

class ProfiledOps final : public Ops {
 public:
  static absl::StatusOr<std::unique_ptr<ProfiledOps>> Create(std::unique_ptr<Ops> inner);

  // Everything since the last call (or Create). Synchronises.
  absl::StatusOr<OpProfile> Take();

  DeviceInfo Info() const override { return inner_->Info(); }
  absl::StatusOr<DeviceBuffer> Allocate(int64_t size_bytes, absl::string_view label) override {
    return inner_->Allocate(size_bytes, label);
  }
  absl::StatusOr<std::unique_ptr<Timeline>> CreateTimeline() override {
    return inner_->CreateTimeline();
  }
  absl::StatusOr<std::unique_ptr<BatchPlan>> PlanBatch(const TokenBatch& batch) override {
    return inner_->PlanBatch(batch);
  }
  absl::Status Synchronize() override { return inner_->Synchronize(); }

  absl::Status Upload(const void* host, TensorView dst) override;
  absl::Status Download(TensorView src, void* host) override;
  absl::Status Copy(TensorView src, TensorView dst) override;
  absl::Status Zero(TensorView dst) override;

  absl::Status Embedding(const EmbeddingParams& p) override;
  absl::Status GatherRows(const GatherRowsParams& p) override;
  absl::Status RmsNorm(const RmsNormParams& p) override;
  absl::Status MatMul(const MatMulParams& p) override;
  absl::Status QkNormRope(const QkNormRopeParams& p) override;
  absl::Status TreeAttention(const TreeAttentionParams& p) override;
  absl::Status SwiGlu(const SwiGluParams& p) override;
  absl::Status LogProbHead(const LogProbHeadParams& p) override;

  absl::Status EmbeddingBackward(const EmbeddingBackwardParams& p) override;
  absl::Status ScatterAddRows(const ScatterAddRowsParams& p) override;
  absl::Status RmsNormBackward(const RmsNormBackwardParams& p) override;
  absl::Status SumRows(const SumRowsParams& p) override;
  absl::Status QkNormRopeBackward(const QkNormRopeBackwardParams& p) override;
  absl::Status TreeAttentionBackward(const TreeAttentionBackwardParams& p) override;
  absl::Status SwiGluBackward(const SwiGluBackwardParams& p) override;
  absl::Status MatMulSwiGlu(const MatMulSwiGluParams& p) override;
  absl::Status MatMulSwiGluBackward(const MatMulSwiGluBackwardParams& p) override;
  absl::Status LogProbHeadBackward(const LogProbHeadBackwardParams& p) override;

  absl::StatusOr<std::unique_ptr<PendingSample>> StartSample(const SampleParams& p) override;
  absl::Status CopyBlocks(const CopyBlocksParams& p) override;

  absl::StatusOr<double> SumSquares(TensorView x) override;
  absl::Status AdamW(const AdamWParams& p) override;

 private:
  explicit ProfiledOps(std::unique_ptr<Ops> inner) : inner_(std::move(inner)) {}
  template <typename Op>
  auto Timed(OpFamily family, const Op& op);

  std::unique_ptr<Ops> inner_;
  std::unique_ptr<Timeline> timeline_;
  std::vector<OpFamily> calls_;  // two marks each
};

}  // namespace coppice::ops
