#include "trainer/prompt_state.h"

#include <numeric>
#include <utility>

#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

int64_t NumBlocks(int64_t rows) {
  return (rows + PromptState::kBlockTokens - 1) / PromptState::kBlockTokens;
}

TensorView PlaceSide(const ModelConfig& config, DType dtype, int64_t rows, Arena& arena) {
  const int64_t blocks = NumBlocks(rows);
  const TensorView flat = arena.Vector(dtype, blocks * PromptState::kBlockTokens * config.kv_dim());
  return View4D(flat.data, dtype, blocks, PromptState::kBlockTokens, config.kv_heads,
                config.head_dim);
}

void HangBelow(int64_t tokens, std::vector<int32_t> blocks, int64_t block_tokens,
               ops::TokenBatch& batch) {
  if (batch.segments.empty()) return;
  batch.block_tokens = static_cast<int32_t>(block_tokens);
  batch.context_nodes = {{.num_tokens = static_cast<int32_t>(tokens)}};
  batch.context_blocks = std::move(blocks);
  batch.segments[0].context_node = 0;
}

}  // namespace

ops::PagedKv PlacePages(const ModelConfig& config, DType dtype, int64_t rows, Arena& arena) {
  const TensorView k = PlaceSide(config, dtype, rows, arena);
  return {.k = k, .v = PlaceSide(config, dtype, rows, arena)};
}

int64_t PromptState::LayOut(const ModelConfig& config, const ops::ActivationTypes& types,
                            int64_t rows, bool pages_only, void* base) {
  Arena arena(base);
  num_rows_ = rows;
  layers_.assign(config.num_layers, {});
  for (Layer& layer : layers_) {
    if (!pages_only) {
      layer.input = arena.Matrix(types.residual, rows, config.hidden);
      layer.attn_out = arena.Matrix(types.compute, rows, config.q_dim());
      layer.lse = arena.Matrix(DType::kF32, rows, config.q_heads);
    }
    layer.pages = PlacePages(config, types.compute, rows, arena);
  }
  return arena.size_bytes();
}

int64_t PromptState::SizeBytes(const ModelConfig& config, const ops::ActivationTypes& types,
                               int64_t rows, bool pages_only) {
  return PromptState().LayOut(config, types, rows, pages_only, nullptr);
}

void PromptState::Place(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows,
                        void* base, bool pages_only) {
  LayOut(config, types, rows, pages_only, base);
}

absl::Status PromptState::Allocate(const ModelConfig& config, ops::Ops& ops, int64_t rows) {
  const ops::ActivationTypes types = ops.Info().activation_types();
  ASSIGN_OR_RETURN(buffer_, ops.Allocate(SizeBytes(config, types, rows), "prompt state"));
  Place(config, types, rows, buffer_.data());
  return absl::OkStatus();
}

absl::Status PromptCapture::OnAttention(int64_t layer, const LayerActivations& acts) {
  for (const KeptRows& piece : pieces_) {
    const PromptState& state = piece.prompt->state;
    const PromptState::Layer& kept = state.layer(layer);
    for (const auto& [from, to] : {std::pair(acts.input, kept.input),
                                   {acts.attn_out, kept.attn_out},
                                   {acts.lse, kept.lse},
                                   {MergeHeads(acts.k), state.keys(layer)},
                                   {MergeHeads(acts.v), state.values(layer)}}) {
      const int64_t filled = piece.prompt->rows_filled;
      RETURN_IF_ERROR(ops_.Copy(from.Rows(piece.row_begin, piece.row_begin + piece.rows),
                                to.Rows(filled, filled + piece.rows)));
    }
  }
  return absl::OkStatus();
}

void PromptCapture::Finish() {
  for (const KeptRows& piece : pieces_) piece.prompt->rows_filled += piece.rows;
  pieces_.clear();
}

int64_t PromptGradients::LayOut(const ModelConfig& config, int64_t rows, void* base) {
  Arena arena(base);
  num_rows_ = rows;
  pages_.assign(config.num_layers, {});
  for (ops::PagedKv& pages : pages_) pages = PlacePages(config, DType::kF32, rows, arena);
  return arena.size_bytes();
}

int64_t PromptGradients::SizeBytes(const ModelConfig& config, int64_t rows) {
  return PromptGradients().LayOut(config, rows, nullptr);
}

void PromptGradients::Place(const ModelConfig& config, int64_t rows, void* base) {
  LayOut(config, rows, base);
}

absl::Status PromptGradients::Zero(ops::Ops& ops) const {
  for (const ops::PagedKv& pages : pages_) {
    RETURN_IF_ERROR(ops.Zero(pages.k));
    RETURN_IF_ERROR(ops.Zero(pages.v));
  }
  return absl::OkStatus();
}

void StoreAsPrompt(ops::TokenBatch& batch) {
  batch.block_tokens = PromptState::kBlockTokens;
  batch.kv_slots.resize(batch.tokens.size());
  std::iota(batch.kv_slots.begin(), batch.kv_slots.end(), 0);
}

void HangBelowPrompt(int64_t rows, ops::TokenBatch& batch) {
  std::vector<int32_t> blocks(NumBlocks(rows));
  std::iota(blocks.begin(), blocks.end(), 0);
  HangBelow(rows, std::move(blocks), PromptState::kBlockTokens, batch);
}

void HangBelowCached(const CachedPrefix& cached, ops::TokenBatch& batch) {
  HangBelow(cached.tokens, cached.blocks, cached.pool->block_tokens(), batch);
}

}  // namespace coppice
