#include "kernels/model/model_check.h"

#include <algorithm>
#include <memory>

#include "kernels/base/status_macros.h"
#include "kernels/model/kv_pool.h"

namespace coppice {
namespace {

// Token 0 at `position`, stored in a block of that number; the row before it is its context.
ops::TokenBatch RowAt(int32_t position, int64_t block_tokens) {
  ops::TokenBatch batch;
  batch.block_tokens = static_cast<int32_t>(block_tokens);
  batch.tokens = {0};
  batch.positions = {position};
  batch.subtree_end = {1};
  batch.kv_slots = {position * batch.block_tokens};
  batch.segments = {{0, 1, position - 1}};
  batch.logit_rows = {0};
  if (position > 0) {
    batch.context_nodes = {{-1, 1, 0}};
    batch.context_blocks = {0};
  }
  return batch;
}

}  // namespace

absl::Status CheckModelRuns(const Decoder& decoder, const Parameters& params,
                            int64_t block_tokens) {
  ops::Ops& ops = decoder.ops();
  const ModelConfig& config = decoder.config();
  ASSIGN_OR_RETURN(const KvPool kv, KvPool::Create(config, 2, block_tokens, ops));
  ASSIGN_OR_RETURN(DeviceBuffer workspace,
                   ops.Allocate(decoder.WorkspaceBytes(1, 1), "model check workspace"));
  ASSIGN_OR_RETURN(const DeviceBuffer logits,
                   ops.Allocate(config.vocab * SizeOf(DType::kF32), "model check logits"));
  const int32_t rows = static_cast<int32_t>(std::min<int64_t>(2, config.max_positions));
  for (int32_t position = 0; position < rows; ++position) {
    ASSIGN_OR_RETURN(const std::unique_ptr<ops::BatchPlan> plan,
                     ops.PlanBatch(RowAt(position, block_tokens)));
    ASSIGN_OR_RETURN(const TensorView hidden, decoder.Forward(params, *plan, &kv, workspace));
    RETURN_IF_ERROR(
        decoder.Logits(params, hidden, View2D(logits.data(), DType::kF32, 1, config.vocab)));
    RETURN_IF_ERROR(ops.Synchronize());
  }
  return absl::OkStatus();
}

}  // namespace coppice
