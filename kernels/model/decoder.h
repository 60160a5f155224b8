// Decoder: the forward pass of a transformer as a list of op calls, the same for prefill, decode,
// scoring and training. Inference reuses one layer's activations for all layers; training keeps
// them (trainer/activations.h) and calls the layer halves itself. Backward is in
// trainer/backward.h.
//
// A layer has two halves. Only the first mixes rows, so the last layer runs the second half on the
// rows with logits alone.
//   attention: input -> norm -> q, k, v -> attn_out        (all rows)
//   mlp:       input + attn_out Wo -> mid -> output        (rows that anybody reads)
//
// Thread: the engine thread. Errors: those of Ops.
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

// Everything one layer computes. Views over memory of the caller; f and r as in
// kernels/ops/params.h. In inference input, mid and output may be one buffer, attn_in and mlp_in
// another, and the rstd and lse views absent.
struct LayerActivations {
  TensorView input;      // [rows, hidden] r: residual stream entering the layer
  TensorView attn_in;    // [rows, hidden] f: normed
  TensorView attn_rstd;  // [rows] f32
  TensorView qkv;        // [rows, qkv_dim] f: projections before qk-norm and RoPE
  TensorView q;  // [rows, q_heads, head_dim] f: after (may alias qkv's columns where no qk-norm
                 // needs them)
  TensorView k;  // [rows, kv_heads, head_dim] f
  TensorView v;  // [rows, kv_heads, head_dim] f: the v columns of qkv
  TensorView attn_out;  // [rows, q_dim] f
  TensorView lse;       // [rows, q_heads] f32
  TensorView mid;       // [rows, hidden] r: residual stream after attention
  TensorView mlp_in;    // [rows, hidden] f: normed
  TensorView mlp_rstd;  // [rows] f32
  TensorView gate_up;   // [rows, 2 * ffn] f
  TensorView mlp_act;   // [rows, ffn] f
  TensorView
      output;  // [rows, hidden] r: residual stream leaving the layer (the next layer's input)
  bool keeps_gate_up = true;  // false: whoever reads it computes it again
};

// Query, key and value columns of a merged projection, split into heads: views for LayerActivations
// and gradients.
struct QkvHeads {
  TensorView q;  // [rows, q_heads, head_dim] f
  TensorView k;  // [rows, kv_heads, head_dim] f
  TensorView v;  // [rows, kv_heads, head_dim] f
};
QkvHeads SplitQkv(const ModelConfig& config, TensorView qkv);  // qkv [rows, qkv_dim]

// Sees what the first half of each layer has computed before anything overwrites it.
class LayerObserver {
 public:
  virtual ~LayerObserver() = default;
  // input, k, v, attn_out and lse of `acts` are valid; work that reads them may be queued.
  virtual absl::Status OnAttention(int64_t layer, const LayerActivations& acts) = 0;
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

  // First half, up to attn_out. `kv` pages are written where the plan has slots and read as
  // context; absent in training without context.
  absl::Status AttentionForward(const LayerParameters& params, const ops::BatchPlan& plan,
                                const ops::PagedKv& kv, const LayerActivations& acts) const;
  // Norm, projection, qk-norm and RoPE only: q, k and v, and the pages. The part that every row of
  // every layer needs.
  absl::Status QkvForward(const LayerParameters& params, const ops::BatchPlan& plan,
                          const ops::PagedKv& kv, const LayerActivations& acts) const;
  // The last step of QkvForward: q and k from the projections, and the pages.
  absl::Status RotateForward(const LayerParameters& params, const ops::BatchPlan& plan,
                             const ops::PagedKv& kv, const LayerActivations& acts) const;
  // Second half, from input and attn_out on; any subset of the rows.
  absl::Status MlpForward(const LayerParameters& params, const LayerActivations& acts) const;
  // The second half up to gate_up: all that backward needs of it.
  absl::Status GateUpForward(const LayerParameters& params, const LayerActivations& acts) const;

  // Embedding, all layers, final norm of the plan's logit_rows -> hidden [head_rows, hidden] f,
  // inside `workspace`. REQUIRES: workspace.size_bytes() >= WorkspaceBytes(rows, head_rows).
  // With an observer every layer runs the attention of all rows, else only what the hidden rows and
  // the KV need.
  absl::StatusOr<TensorView> Forward(const Parameters& params, const ops::BatchPlan& plan,
                                     const KvPool* kv, DeviceBuffer& workspace,
                                     LayerObserver* observer = nullptr) const;
  // logits [head_rows, vocab] f32 = hidden head^T
  absl::Status Logits(const Parameters& params, TensorView hidden, TensorView logits) const;

 private:
  Decoder(const ModelConfig& config, ops::Ops& ops) : config_(config), ops_(&ops) {}

  ops::NormMatMulParams Projections(const LayerParameters& params,
                                    const LayerActivations& acts) const;
  ops::QkNormRopeParams Rotation(const LayerParameters& params, const ops::BatchPlan& plan,
                                 const ops::PagedKv& kv, const LayerActivations& acts) const;
  absl::Status Attend(const ops::BatchPlan& plan, const ops::PagedKv& kv,
                      const LayerActivations& acts) const;
  // The second half, without the next layer's projections.
  ops::MlpBlockParams Block(const LayerParameters& params, const LayerActivations& acts) const;
  // mid = input + attn_out Wo
  absl::Status MidForward(const LayerParameters& params, const LayerActivations& acts) const;
  ops::RmsNormParams MlpNorm(const LayerParameters& params, const LayerActivations& acts) const;

  ModelConfig config_;
  ops::Ops* ops_;
  DeviceBuffer rope_buffer_;
  TensorView rope_;
};

}  // namespace coppice
