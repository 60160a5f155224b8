#include "kernels/cuda/batch_plan.h"

#include <algorithm>
#include <vector>

#include "kernels/base/status_macros.h"

namespace coppice::cuda {
namespace {

int64_t MaxOf(const std::vector<int32_t>& v) {
  return v.empty() ? -1 : *std::max_element(v.begin(), v.end());
}

// Copies `words` to fresh device memory; stream-ordered, and done with the host's copy on return.
// Through pinned memory: from pageable memory a large copy waits for all that is queued.
absl::StatusOr<void*> UploadWords(Context& context, const std::vector<int32_t>& words) {
  void* memory = nullptr;
  const size_t size_bytes = std::max<size_t>(words.size(), 1) * sizeof(int32_t);
  RETURN_IF_ERROR(
      context.Check(cudaMallocAsync(&memory, size_bytes, context.stream()), "plan memory"));
  PinnedMemory::Block* block = nullptr;
  RETURN_IF_ERROR(context.Check(context.pinned().Take(static_cast<int64_t>(size_bytes), &block),
                                "plan staging"));
  std::copy(words.begin(), words.end(), reinterpret_cast<int32_t*>(block->data));
  const cudaError_t copied = cudaMemcpyAsync(memory, block->data, words.size() * sizeof(int32_t),
                                             cudaMemcpyHostToDevice, context.stream());
  const cudaError_t marked = PinnedMemory::Mark(*block, context.stream());
  PinnedMemory::GiveBack(*block);
  RETURN_IF_ERROR(context.Check(copied, "plan upload"));
  RETURN_IF_ERROR(context.Check(marked, "plan upload"));
  return memory;
}

}  // namespace

const CudaBatchPlan& CudaPlan(const ops::BatchPlan* plan) {
  return static_cast<const CudaBatchPlan&>(*plan);
}

absl::StatusOr<std::unique_ptr<CudaBatchPlan>> CudaBatchPlan::Create(Context& context,
                                                                     const ops::TokenBatch& batch) {
  std::unique_ptr<CudaBatchPlan> plan(new CudaBatchPlan(context, batch));
  RETURN_IF_ERROR(plan->Upload());
  return plan;
}

CudaBatchPlan::~CudaBatchPlan() {
  if (memory_ != nullptr) cudaFreeAsync(memory_, context_.stream());
  if (attention_ && attention_->words != nullptr)
    cudaFreeAsync(attention_->words, context_.stream());
}

absl::Status CudaBatchPlan::Upload() {
  constexpr size_t kAlign = 64;  // words
  struct Part {
    const std::vector<int32_t>& host;
    TensorView& view;
  };
  const Part parts[] = {{batch_.tokens, tokens_},
                        {batch_.positions, positions_},
                        {batch_.kv_slots, kv_slots_},
                        {batch_.logit_rows, logit_rows_}};
  std::vector<int32_t> words;
  std::vector<size_t> offsets;
  for (const Part& part : parts) {
    offsets.push_back(words.size());
    words.insert(words.end(), part.host.begin(), part.host.end());
    words.resize((words.size() + kAlign - 1) / kAlign * kAlign);
  }
  ASSIGN_OR_RETURN(memory_, UploadWords(context_, words));
  for (size_t i = 0; i < offsets.size(); ++i) {
    const Part& part = parts[i];
    if (part.host.empty() && batch_.num_rows() > 0) continue;  // absent
    part.view = View1D(static_cast<int32_t*>(memory_) + offsets[i], DType::kI32,
                       static_cast<int64_t>(part.host.size()));
  }
  max_position_ = MaxOf(batch_.positions);
  max_block_ = MaxOf(batch_.context_blocks);
  max_slot_ = MaxOf(batch_.kv_slots);
  return absl::OkStatus();
}

absl::StatusOr<const CudaBatchPlan::Attention*> CudaBatchPlan::PlanFor(
    const AttentionPlanOptions& options) const {
  AttentionPlanOptions enough = options;
  if (attention_) enough.backward |= attention_->options.backward;
  if (attention_ && attention_->options == enough) return &*attention_;
  if (attention_) cudaFreeAsync(attention_->words, context_.stream());
  attention_.reset();
  const AttentionPlan plan = PlanAttention(batch_, options);
  Attention attention = {.options = options,
                         .has_context = plan.has_context,
                         .schedule = {},
                         .rounds = plan.rounds,
                         .words = nullptr};
  ASSIGN_OR_RETURN(attention.words, UploadWords(context_, plan.words));
  attention.schedule = plan.Bind(static_cast<const int32_t*>(attention.words));
  attention_ = attention;
  return &*attention_;
}

}  // namespace coppice::cuda
