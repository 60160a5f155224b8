// Activations: what the forward pass leaves for the backward pass, in one arena laid out from a
// table of specs (after karpathy/llm.c), plus the gradients of activations. Grows to the largest
// pass seen and is reused across passes and steps.
//
// Retain says what survives until backward; the rest shares one buffer over all layers and is
// recomputed layer by layer:
//   kAll          everything
//   kProjections  not the norms and the SwiGLU output (elementwise, cheap to recompute)
//   kInputs       only each layer's input: one more forward pass of compute for the least memory
//   kPrompt       nothing: what backward starts from lies in a PromptState (UsePrompt)
//   kNothing      scoring: no backward follows
// The second half of the last layer runs on the head rows alone (`tail`).
//
// Owner and thread: the trainer on the engine thread. Errors: RESOURCE_EXHAUSTED of the device's
// allocator.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/base/device.h"
#include "kernels/model/decoder.h"
#include "kernels/ops/ops.h"
#include "trainer/prompt_state.h"

namespace coppice {

enum class Retain { kNothing, kPrompt, kInputs, kProjections, kAll };

// Gradients of activations, reused by all layers. f = compute dtype.
struct ActivationGradients {
  TensorView residual;       // [rows, hidden] f: of the residual stream, from the last layer down
  TensorView normed;         // [rows, hidden] f: of a norm's output
  TensorView attn_out;       // [rows, q_dim] f
  TensorView qkv;            // [rows, qkv_dim] f
  TensorView mlp_act;        // [rows, ffn] f
  TensorView tail_residual;  // [head_rows, hidden] f
  TensorView tail_attn_out;  // [head_rows, q_dim] f
};

class Activations {
 public:
  // Bytes of a pass over `rows` rows with `head_rows` head rows.
  static int64_t SizeBytes(const ModelConfig& config, DType dtype, int64_t rows, int64_t head_rows,
                           Retain retain);
  // The most that fits `budget_bytes`, kInputs if nothing does.
  static Retain Choose(const ModelConfig& config, DType dtype, int64_t rows, int64_t head_rows,
                       int64_t budget_bytes);
  // Rows that a pass may have within `budget_bytes` with kInputs, head rows included.
  static int64_t MaxRows(const ModelConfig& config, DType dtype, int64_t budget_bytes);

  // Lays the views out for one pass; allocates only to grow. Views of former passes become invalid.
  absl::Status Prepare(const ModelConfig& config, ops::Ops& ops, int64_t rows, int64_t head_rows,
                       Retain retain);

  // Every layer's input, attn_out and lse become those of `state`, until the next Prepare.
  // REQUIRES: Prepare(kPrompt) for its number of rows.
  void UsePrompt(const PromptState& state);

  Retain retain() const { return retain_; }
  int64_t size_bytes() const { return buffer_.size_bytes(); }
  // The last layer has only the fields of the attention half.
  const LayerActivations& layer(int64_t l) const { return layers_[l]; }
  // Second half of the last layer on the head rows.
  const LayerActivations& tail() const { return tail_; }
  TensorView hidden() const { return hidden_; }  // [head_rows, hidden] f: after the final norm
  TensorView hidden_rstd() const { return hidden_rstd_; }              // [head_rows] f32
  const ActivationGradients& gradients() const { return gradients_; }  // absent with kNothing

 private:
  // Returns the bytes used from `base` on; null only counts.
  int64_t LayOut(const ModelConfig& config, DType dtype, int64_t rows, int64_t head_rows,
                 Retain retain, void* base);

  DeviceBuffer buffer_;
  Retain retain_ = Retain::kNothing;
  std::vector<LayerActivations> layers_;
  LayerActivations tail_;
  TensorView hidden_;
  TensorView hidden_rstd_;
  ActivationGradients gradients_;
};

}  // namespace coppice
