// CudaBatchPlan: a TokenBatch with its arrays in device memory (one stream-ordered allocation from
// the pool) and the schedule of its attention, planned at the first use, when the heads are known.
// Built once per batch, used by every layer.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/attention/attention_plan.h"
#include "kernels/cuda/context.h"
#include "kernels/ops/ops.h"

namespace coppice::cuda {

class CudaBatchPlan final : public ops::BatchPlan {
 public:
  // Borrows `context`. REQUIRES: batch.Validate() is OK.
  static absl::StatusOr<std::unique_ptr<CudaBatchPlan>> Create(Context& context,
                                                               const ops::TokenBatch& batch);
  ~CudaBatchPlan() override;

  const ops::TokenBatch& batch() const override { return batch_; }
  TensorView tokens() const override { return tokens_; }
  TensorView positions() const override { return positions_; }
  TensorView kv_slots() const override { return kv_slots_; }
  TensorView logit_rows() const override { return logit_rows_; }

  int64_t max_position() const { return max_position_; }    // -1 without rows
  int64_t max_context_block() const { return max_block_; }  // -1 without context
  int64_t max_kv_slot() const { return max_slot_; }         // -1 without slots

  struct Attention {
    AttentionPlanOptions options;
    bool has_context = false;
    AttentionSchedule schedule;  // bound to device memory
    std::vector<BackwardRound> rounds;
    void* words = nullptr;
  };
  // The schedule for these options; planned and uploaded when they differ from the last call's.
  absl::StatusOr<const Attention*> PlanFor(const AttentionPlanOptions& options) const;

 private:
  CudaBatchPlan(Context& context, const ops::TokenBatch& batch)
      : context_(context), batch_(batch) {}
  absl::Status Upload();

  Context& context_;
  ops::TokenBatch batch_;
  void* memory_ = nullptr;
  TensorView tokens_, positions_, kv_slots_, logit_rows_;
  int64_t max_position_ = -1, max_block_ = -1, max_slot_ = -1;
  mutable std::optional<Attention> attention_;
};

// REQUIRES: `plan` was made by CudaOps::PlanBatch.
const CudaBatchPlan& CudaPlan(const ops::BatchPlan* plan);

}  // namespace coppice::cuda
