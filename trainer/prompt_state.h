// PromptState: what the rows of a prompt leave behind in every layer, so that branches attend to
// them and backward runs through them later without a second forward pass: the layer's input, keys
// and values, the attention's output and its log-sum-exp. All else is recomputed from these, layer
// by layer (Retain::kPrompt in activations.h).
// KeptPrompt: the state of a prompt that generation has computed; PromptCapture fills it from the
// layers of its prefill.
// PromptGradients: the gradients of its keys and values, added up over the branches in f32.
//
// Keys and values lie in pages of kBlockTokens positions, in order, as context of a TokenBatch.
// The trainer places state and gradients in its own memory; the state of a KeptPrompt has memory of
// its own. Thread: the engine thread.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/base/device.h"
#include "kernels/base/ids.h"
#include "kernels/model/arena.h"
#include "kernels/model/decoder.h"
#include "kernels/model/kv_pool.h"
#include "kernels/model/model_config.h"
#include "kernels/ops/ops.h"
#include "trainer/train_types.h"

namespace coppice {

// Pages of kBlockTokens positions for `rows` tokens of one layer.
ops::PagedKv PlacePages(const ModelConfig& config, DType dtype, int64_t rows, Arena& arena);

// The first `rows` positions of pages that lie in order: [rows, kv_dim].
inline TensorView FlattenPages(const TensorView& pages, int64_t rows) {
  return View2D(pages.data, pages.dtype, rows, pages.dim(2) * pages.dim(3));
}

// [rows, heads, head_dim] with heads side by side -> [rows, heads * head_dim]
inline TensorView MergeHeads(const TensorView& t) {
  TensorView merged = View2D(t.data, t.dtype, t.dim(0), t.dim(1) * t.dim(2));
  merged.stride[0] = t.stride[0];
  return merged;
}

class PromptState {
 public:
  static constexpr int64_t kBlockTokens = 128;

  struct Layer {
    TensorView input;     // [rows, hidden] r
    TensorView attn_out;  // [rows, q_dim] f
    TensorView lse;       // [rows, q_heads] f32
    ops::PagedKv pages;   // [blocks, kBlockTokens, kv_heads, head_dim] f
  };

  static int64_t SizeBytes(const ModelConfig& config, const ops::ActivationTypes& types,
                           int64_t rows, bool pages_only = false);

  // Lays the views out for a prompt of `rows` tokens in SizeBytes() from `base` on; pages_only: not
  // those that backward starts from, where it has the prompt's activations.
  void Place(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows, void* base,
             bool pages_only = false);
  // The same in memory of its own. RESOURCE_EXHAUSTED of the device's allocator.
  absl::Status Allocate(const ModelConfig& config, ops::Ops& ops, int64_t rows);

  int64_t num_rows() const { return num_rows_; }
  int64_t size_bytes() const { return buffer_.size_bytes(); }  // of its own memory
  const Layer& layer(int64_t l) const { return layers_[l]; }
  // [rows, kv_dim] f
  TensorView keys(int64_t l) const { return FlattenPages(layers_[l].pages.k, num_rows_); }
  TensorView values(int64_t l) const { return FlattenPages(layers_[l].pages.v, num_rows_); }

 private:
  int64_t LayOut(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows,
                 bool pages_only, void* base);

  DeviceBuffer buffer_;
  std::vector<Layer> layers_;
  int64_t num_rows_ = 0;
};

struct KeptPrompt {
  std::vector<int32_t> tokens;
  PolicyVersion version{0};  // of the weights that computed it
  PromptState state;
  int64_t rows_filled = 0;

  bool complete() const { return rows_filled == static_cast<int64_t>(tokens.size()); }
};

// Rows [row_begin, row_begin + rows) of a batch that continue `prompt` where it is filled up to.
struct KeptRows {
  int64_t row_begin = 0;
  int64_t rows = 0;
  std::shared_ptr<KeptPrompt> prompt;
};

// Fills prompts from the batch that runs their rows.
class PromptCapture final : public LayerObserver {
 public:
  PromptCapture(ops::Ops& ops, std::vector<KeptRows> pieces)
      : ops_(ops), pieces_(std::move(pieces)) {}

  absl::Status OnAttention(int64_t layer, const LayerActivations& acts) override;
  // The batch has run: its rows count as filled.
  void Finish();

 private:
  ops::Ops& ops_;
  std::vector<KeptRows> pieces_;
};

class PromptGradients {
 public:
  static int64_t SizeBytes(const ModelConfig& config, int64_t rows);

  // As PromptState::Place.
  void Place(const ModelConfig& config, int64_t rows, void* base);
  absl::Status Zero(ops::Ops& ops) const;

  // Shaped like PromptState::Layer::pages, f32.
  const ops::PagedKv& pages(int64_t layer) const { return pages_[layer]; }
  // [rows, kv_dim] f32
  TensorView keys(int64_t layer) const { return FlattenPages(pages_[layer].k, num_rows_); }
  TensorView values(int64_t layer) const { return FlattenPages(pages_[layer].v, num_rows_); }

 private:
  int64_t LayOut(const ModelConfig& config, int64_t rows, void* base);

  std::vector<ops::PagedKv> pages_;
  int64_t num_rows_ = 0;
};

// How the tree that runs meets a prompt that runs apart from it. Branches name both; the prompt's
// own tree its gradients only, which it takes in; a whole tree neither. What is scored behind the
// cache names the pool.
struct PromptLink {
  const PromptState* context = nullptr;
  const PromptGradients* gradients = nullptr;
  const KvPool* pool = nullptr;

  ops::PagedKv Context(int64_t layer) const {
    if (pool != nullptr) return pool->layer(layer);
    return context == nullptr ? ops::PagedKv{} : context->layer(layer).pages;
  }
};

// Makes a batch of the prompt's rows store its keys and values into the state.
void StoreAsPrompt(ops::TokenBatch& batch);
// Hangs the batch's one segment, if it has rows, below a prompt of `rows` tokens.
void HangBelowPrompt(int64_t rows, ops::TokenBatch& batch);
// The same below what the cache holds.
void HangBelowCached(const CachedPrefix& cached, ops::TokenBatch& batch);

}  // namespace coppice
