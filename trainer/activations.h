// Activations: what the forward pass leaves for the backward pass, in one arena laid out from a
// table of specs (after karpathy/llm.c), plus the gradients of activations. Views only: the memory
// is the trainer's.
//
// Retain says what survives of a layer until backward; the rest shares one buffer over all layers
// and is recomputed layer by layer:
//   kAll          everything but the SwiGLU output, which its backward gives again
//   kProjections  not the norms, whose backward gives them again, nor q and k after theirs (cheap)
//   kLean         nothing of the second half: two products more
//   kInputs       only the layer's input: one more forward pass of compute for the least memory
//   kPrompt       nothing: what backward starts from lies in a PromptState (UsePrompt); of prompts
//                 that run apart from their branches and that generation kept, or where memory is
//                 scarce
//   kNothing      scoring: no backward follows
// Retention is the table of layers: each step down saves less time for a byte than the step before
// it, so a pass has at most two levels, the better one in as many layers as the budget holds.
// The second half of the last layer runs on the head rows alone (`tail`).
//
// Owner and thread: the trainer on the engine thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/model/decoder.h"
#include "kernels/ops/ops.h"
#include "trainer/prompt_state.h"

namespace coppice {

enum class Retain { kNothing, kPrompt, kInputs, kLean, kProjections, kAll };

const char* Name(Retain retain);

// The first `num_better` layers have the level after `level`, the others `level`.
struct Retention {
  Retain level = Retain::kNothing;
  int64_t num_better = 0;  // > 0 between kInputs and kProjections only

  // NOLINTNEXTLINE(google-explicit-constructor): one level for all layers is the usual case.
  Retention(Retain all = Retain::kNothing) : level(all) {}
  Retention(Retain least, int64_t better) : level(least), num_better(better) {}

  Retain of(int64_t layer) const {
    return layer < num_better ? static_cast<Retain>(static_cast<int>(level) + 1) : level;
  }
  std::string ToString(int64_t num_layers) const;  // "projections=16 lean=20"
  bool operator==(const Retention&) const = default;
};

// Gradients of activations, reused by all layers; in f, also those of the residual stream, which
// products read.
struct ActivationGradients {
  TensorView residual;       // [rows, hidden] f: of the residual stream, from the last layer down
  TensorView normed;         // [rows, hidden] f: of a norm's output
  TensorView attn_out;       // [rows, q_dim] f
  TensorView qkv;            // [rows, qkv_dim] f
  TensorView mlp_act;        // [rows, ffn] f; also every layer's SwiGLU output
  TensorView tail_residual;  // [head_rows, hidden] f
  TensorView tail_attn_out;  // [head_rows, q_dim] f
};

class Activations {
 public:
  // Bytes of a pass over `rows` rows with `head_rows` head rows, each layer's workspace of at least
  // `workspace_bytes`.
  static int64_t SizeBytes(const ModelConfig& config, const ops::ActivationTypes& types,
                           int64_t rows, int64_t head_rows, Retention retention,
                           int64_t workspace_bytes = 0);
  // The most that fits `budget_bytes`, kInputs if nothing does. O(layers log layers).
  static Retention Choose(const ModelConfig& config, const ops::ActivationTypes& types,
                          int64_t rows, int64_t head_rows, int64_t budget_bytes,
                          int64_t workspace_bytes = 0);
  // Rows that a pass may have within `budget_bytes` with kInputs, head rows included.
  static int64_t MaxRows(const ModelConfig& config, const ops::ActivationTypes& types,
                         int64_t budget_bytes);

  // Lays the views out for one pass in `size_bytes` from `base` on: what SizeBytes() leaves of them
  // joins the workspaces, behind all else. Views of former passes become invalid.
  void Place(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows,
             int64_t head_rows, Retention retention, int64_t size_bytes, void* base);

  // Every layer's input, attn_out and lse become those of `state`, until the next Place.
  // REQUIRES: Place(kPrompt) for its number of rows.
  void UsePrompt(const PromptState& state);

  const Retention& retention() const { return retention_; }
  // The last layer has only the fields of the attention half.
  const LayerActivations& layer(int64_t l) const { return layers_[l]; }
  // Second half of the last layer on the head rows.
  const LayerActivations& tail() const { return tail_; }
  TensorView hidden() const { return hidden_; }  // [head_rows, hidden] f: after the final norm
  TensorView hidden_rstd() const { return hidden_rstd_; }              // [head_rows] f32
  const ActivationGradients& gradients() const { return gradients_; }  // absent with kNothing
  // [bytes] u8: what nobody reads any more when layer l's backward comes to its attention: spare
  // bytes, buffers of the second half, all of the layers behind.
  TensorView workspace(int64_t l) const { return workspaces_[l]; }
  TensorView spare() const { return spare_; }  // [bytes] u8: part of every workspace, nobody's yet

 private:
  // Returns the bytes used from `base` on; null only counts.
  int64_t LayOut(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows,
                 int64_t head_rows, Retention retention, int64_t spare_bytes, void* base);

  Retention retention_;
  std::vector<LayerActivations> layers_;
  LayerActivations tail_;
  TensorView hidden_;
  TensorView hidden_rstd_;
  ActivationGradients gradients_;
  std::vector<TensorView> workspaces_;
  TensorView spare_;
};

}  // namespace coppice
