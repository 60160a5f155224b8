#include "trainer/activations.h"

#include <algorithm>

#include "kernels/base/status_macros.h"
#include "kernels/model/arena.h"

namespace coppice {
namespace {

enum class Half { kAttention, kMlp };

// One tensor of every layer: [rows, columns], kept for each layer from `from` on, else one buffer
// for all.
struct Spec {
  TensorView LayerActivations::*field;
  Half half;
  Retain from;
  int64_t (*columns)(const ModelConfig&);
  bool f32 = false;  // whatever the compute dtype
};

constexpr Spec kSpecs[] = {
    {&LayerActivations::input, Half::kAttention, Retain::kInputs,
     [](const ModelConfig& c) { return c.hidden; }},
    {&LayerActivations::attn_in, Half::kAttention, Retain::kAll,
     [](const ModelConfig& c) { return c.hidden; }},
    {&LayerActivations::attn_rstd, Half::kAttention, Retain::kProjections,
     [](const ModelConfig&) { return int64_t{1}; }, true},
    {&LayerActivations::qkv, Half::kAttention, Retain::kProjections,
     [](const ModelConfig& c) { return c.qkv_dim(); }},
    {&LayerActivations::attn_out, Half::kAttention, Retain::kProjections,
     [](const ModelConfig& c) { return c.q_dim(); }},
    {&LayerActivations::lse, Half::kAttention, Retain::kProjections,
     [](const ModelConfig& c) { return c.q_heads; }, true},
    {&LayerActivations::mid, Half::kMlp, Retain::kProjections,
     [](const ModelConfig& c) { return c.hidden; }},
    {&LayerActivations::mlp_in, Half::kMlp, Retain::kAll,
     [](const ModelConfig& c) { return c.hidden; }},
    {&LayerActivations::mlp_rstd, Half::kMlp, Retain::kProjections,
     [](const ModelConfig&) { return int64_t{1}; }, true},
    {&LayerActivations::gate_up, Half::kMlp, Retain::kProjections,
     [](const ModelConfig& c) { return 2 * c.ffn; }},
    {&LayerActivations::mlp_act, Half::kMlp, Retain::kAll,
     [](const ModelConfig& c) { return c.ffn; }},
};

// Hands out the tensors of one pass: a fresh one for what is kept, the shared one for what is not.
class Layout {
 public:
  Layout(const ModelConfig& config, DType dtype, Retain retain, Arena& arena)
      : config_(config), dtype_(dtype), retain_(retain), arena_(arena) {}

  // REQUIRES: the same `rows` in every call that may share.
  void Fill(Half half, int64_t rows, LayerActivations& acts) {
    for (size_t i = 0; i < std::size(kSpecs); ++i) {
      if (kSpecs[i].half != half) continue;
      TensorView& view = acts.*kSpecs[i].field;
      if (retain_ >= kSpecs[i].from) {
        view = Take(kSpecs[i], rows);
      } else {
        if (!shared_[i].present()) shared_[i] = Take(kSpecs[i], rows);
        view = shared_[i];
      }
    }
    if (half == Half::kAttention) FillHeads(rows, acts);
  }

  // A second half of its own, whatever is retained.
  void FillTail(int64_t rows, LayerActivations& tail) {
    tail.input = arena_.Matrix(dtype_, rows, config_.hidden);
    tail.attn_out = arena_.Matrix(dtype_, rows, config_.q_dim());
    for (const Spec& spec : kSpecs) {
      if (spec.half == Half::kMlp) tail.*spec.field = Take(spec, rows);
    }
    tail.output = arena_.Matrix(dtype_, rows, config_.hidden);
  }

 private:
  TensorView Take(const Spec& spec, int64_t rows) {
    const DType dtype = spec.f32 ? DType::kF32 : dtype_;
    const int64_t columns = spec.columns(config_);
    return columns == 1 ? arena_.Vector(dtype, rows) : arena_.Matrix(dtype, rows, columns);
  }

  // q, k, v: columns of qkv; with qk-norm the normed q and k are tensors of their own, since
  // backward reads both.
  void FillHeads(int64_t rows, LayerActivations& acts) {
    const QkvHeads heads = SplitQkv(config_, acts.qkv);
    acts.q = heads.q;
    acts.k = heads.k;
    acts.v = heads.v;
    if (!config_.qk_norm) return;
    const bool keep = retain_ >= Retain::kProjections;
    if (keep || !normed_qk_.present()) {
      normed_qk_ = arena_.Matrix(dtype_, rows, config_.q_dim() + config_.kv_dim());
    }
    acts.q = normed_qk_.Cols(0, config_.q_dim()).SplitHeads(config_.q_heads, config_.head_dim);
    acts.k = normed_qk_.Cols(config_.q_dim(), config_.q_dim() + config_.kv_dim())
                 .SplitHeads(config_.kv_heads, config_.head_dim);
  }

  const ModelConfig& config_;
  DType dtype_;
  Retain retain_;
  Arena& arena_;
  TensorView shared_[std::size(kSpecs)];
  TensorView normed_qk_;
};

ActivationGradients LayOutGradients(const ModelConfig& config, DType dtype, int64_t rows,
                                    int64_t head_rows, Arena& arena) {
  ActivationGradients g;
  g.residual = arena.Matrix(dtype, rows, config.hidden);
  g.normed = arena.Matrix(dtype, rows, config.hidden);
  g.attn_out = arena.Matrix(dtype, rows, config.q_dim());
  g.qkv = arena.Matrix(dtype, rows, config.qkv_dim());
  g.mlp_act = arena.Matrix(dtype, rows, config.ffn);
  g.tail_residual = arena.Matrix(dtype, head_rows, config.hidden);
  g.tail_attn_out = arena.Matrix(dtype, head_rows, config.q_dim());
  return g;
}

}  // namespace

int64_t Activations::LayOut(const ModelConfig& config, DType dtype, int64_t rows, int64_t head_rows,
                            Retain retain, void* base) {
  Arena arena(base);
  Layout layout(config, dtype, retain, arena);
  const int64_t last = config.num_layers - 1;
  layers_.assign(config.num_layers, {});
  for (int64_t l = 0; l <= last; ++l) {
    layout.Fill(Half::kAttention, rows, layers_[l]);
    if (l < last) layout.Fill(Half::kMlp, rows, layers_[l]);
    if (l > 0) layers_[l - 1].output = layers_[l].input;
  }
  tail_ = {};
  layout.FillTail(head_rows, tail_);
  hidden_ = arena.Matrix(dtype, head_rows, config.hidden);
  hidden_rstd_ = arena.Vector(DType::kF32, head_rows);
  gradients_ = {};
  if (retain != Retain::kNothing) {
    gradients_ = LayOutGradients(config, dtype, rows, head_rows, arena);
  }
  return arena.size_bytes();
}

int64_t Activations::SizeBytes(const ModelConfig& config, DType dtype, int64_t rows,
                               int64_t head_rows, Retain retain) {
  return Activations().LayOut(config, dtype, rows, head_rows, retain, nullptr);
}

Retain Activations::Choose(const ModelConfig& config, DType dtype, int64_t rows, int64_t head_rows,
                           int64_t budget_bytes) {
  for (const Retain retain : {Retain::kAll, Retain::kProjections}) {
    if (SizeBytes(config, dtype, rows, head_rows, retain) <= budget_bytes) return retain;
  }
  return Retain::kInputs;
}

int64_t Activations::MaxRows(const ModelConfig& config, DType dtype, int64_t budget_bytes) {
  constexpr int64_t kProbe =
      4096;  // sizes are linear in rows up to alignment, which this many rows drown
  const int64_t probe = SizeBytes(config, dtype, kProbe, kProbe, Retain::kInputs);
  return static_cast<int64_t>(static_cast<double>(budget_bytes) / static_cast<double>(probe) *
                              kProbe);
}

absl::Status Activations::Prepare(const ModelConfig& config, ops::Ops& ops, int64_t rows,
                                  int64_t head_rows, Retain retain) {
  const DType dtype = ops.Info().compute_dtype;
  const int64_t bytes = SizeBytes(config, dtype, rows, head_rows, retain);
  if (bytes > buffer_.size_bytes()) {
    buffer_ = DeviceBuffer();  // free first: old and new need not exist together
    ASSIGN_OR_RETURN(buffer_, ops.Allocate(bytes, "activations"));
  }
  retain_ = retain;
  LayOut(config, dtype, rows, head_rows, retain, buffer_.data());
  return absl::OkStatus();
}

void Activations::UsePrompt(const PromptState& state) {
  for (size_t l = 0; l < layers_.size(); ++l) {
    const PromptState::Layer& kept = state.layer(l);
    layers_[l].input = kept.input;
    layers_[l].attn_out = kept.attn_out;
    layers_[l].lse = kept.lse;
    if (l > 0) layers_[l - 1].output = kept.input;
  }
}

}  // namespace coppice
