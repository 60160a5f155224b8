// Decoder: the forward pass of a transformer as a list of op calls, the same for prefill, decode, scoring and training.
// Inference reuses one layer's activations for all layers; training keeps them (trainer/activations.h) and calls LayerForward
// layer by layer. Backward is in trainer/backward.h.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/device.h"
#include "kernels/model/kv_pool.h"
#include "kernels/model/model_config.h"
#include "kernels/model/parameters.h"
#include "kernels/ops/ops.h"

namespace coppice {

// Everything one layer computes. Views over memory of the caller; f = compute dtype.
struct LayerActivations {
  TensorView input;      // [rows, hidden] f: residual stream entering the layer
  TensorView attn_in;    // [rows, hidden] f: normed
  TensorView attn_rstd;  // [rows] f32
  TensorView qkv;        // [rows, qkv_dim] f: projections before qk-norm and RoPE
  TensorView q;          // [rows, q_heads, head_dim] f: after (may alias qkv's columns in inference)
  TensorView k;          // [rows, kv_heads, head_dim] f
  TensorView v;          // [rows, kv_heads, head_dim] f: the v columns of qkv
  TensorView attn_out;   // [rows, q_dim] f
  TensorView lse;        // [rows, q_heads] f32
  TensorView mid;        // [rows, hidden] f: residual stream after attention
  TensorView mlp_in;     // [rows, hidden] f: normed
  TensorView mlp_rstd;   // [rows] f32
  TensorView gate_up;    // [rows, 2 * ffn] f
  TensorView mlp_act;    // [rows, ffn] f
  TensorView output;     // [rows, hidden] f: residual stream leaving the layer (the next layer's input)
};

class Decoder {
 public:
  // Builds the RoPE table on the device. Borrows `ops`.
  static absl::StatusOr<std::unique_ptr<Decoder>> Create(const ModelConfig& config, ops::Ops& ops);

  const ModelConfig& config() const { return config_; }
  TensorView rope() const { return rope_; }  // [max_positions, head_dim] f32
  ops::Ops& ops() const { return *ops_; }

  // Bytes of workspace for Forward over at most `max_rows` rows and `max_head_rows` head rows.
  int64_t WorkspaceBytes(int64_t max_rows, int64_t max_head_rows) const;

  // One layer. `kv` pages are written where the plan has slots and read as context; absent in training without context.
  absl::Status LayerForward(const LayerParameters& params, const ops::BatchPlan& plan, const ops::PagedKv& kv,
                            const LayerActivations& acts) const;

  // Embedding, all layers, final norm of the plan's logit_rows -> hidden [head_rows, hidden] f, inside `workspace`.
  absl::StatusOr<TensorView> Forward(const Parameters& params, const ops::BatchPlan& plan, const KvPool* kv,
                                     DeviceBuffer& workspace) const;
  // logits [head_rows, vocab] f32 = hidden head^T
  absl::Status Logits(const Parameters& params, TensorView hidden, TensorView logits) const;

 private:
  Decoder(const ModelConfig& config, ops::Ops& ops) : config_(config), ops_(&ops) {}

  ModelConfig config_;
  ops::Ops* ops_;
  DeviceBuffer rope_buffer_;
  TensorView rope_;
};

}  // namespace coppice
