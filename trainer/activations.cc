#include "trainer/activations.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/model/arena.h"

namespace coppice {
namespace {

enum class Half { kAttention, kMlp };

enum class Kind { kCompute, kResidual, kF32 };

// One tensor of every layer: [rows, columns], kept in layers that retain at least `from`, else one
// buffer for all.
struct Spec {
  TensorView LayerActivations::*field;
  Half half;
  Retain from;
  int64_t (*columns)(const ModelConfig&);
  Kind kind = Kind::kCompute;
};

constexpr Spec kSpecs[] = {
    {&LayerActivations::input, Half::kAttention, Retain::kInputs,
     [](const ModelConfig& c) { return c.hidden; }, Kind::kResidual},
    {&LayerActivations::attn_in, Half::kAttention, Retain::kAll,
     [](const ModelConfig& c) { return c.hidden; }},
    {&LayerActivations::attn_rstd, Half::kAttention, Retain::kLean,
     [](const ModelConfig&) { return int64_t{1}; }, Kind::kF32},
    {&LayerActivations::qkv, Half::kAttention, Retain::kLean,
     [](const ModelConfig& c) { return c.qkv_dim(); }},
    {&LayerActivations::attn_out, Half::kAttention, Retain::kLean,
     [](const ModelConfig& c) { return c.q_dim(); }},
    {&LayerActivations::lse, Half::kAttention, Retain::kLean,
     [](const ModelConfig& c) { return c.q_heads; }, Kind::kF32},
    {&LayerActivations::mid, Half::kMlp, Retain::kProjections,
     [](const ModelConfig& c) { return c.hidden; }, Kind::kResidual},
    {&LayerActivations::mlp_in, Half::kMlp, Retain::kAll,
     [](const ModelConfig& c) { return c.hidden; }},
    {&LayerActivations::mlp_rstd, Half::kMlp, Retain::kProjections,
     [](const ModelConfig&) { return int64_t{1}; }, Kind::kF32},
    {&LayerActivations::gate_up, Half::kMlp, Retain::kProjections,
     [](const ModelConfig& c) { return 2 * c.ffn; }},
};

// Hands out the tensors of one pass: a fresh one for what is kept, the shared one for what is not.
class Layout {
 public:
  Layout(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows, Arena& arena)
      : config_(config), types_(types), rows_(rows), arena_(arena) {}

  // Buffers for all layers of what those with `least` do not keep. Before Borrow of the same half.
  void Share(Half half, Retain least) {
    for (size_t i = 0; i < std::size(kSpecs); ++i) {
      if (kSpecs[i].half == half && least < kSpecs[i].from) shared_[i] = Take(kSpecs[i], rows_);
    }
    if (half == Half::kMlp) {
      mlp_act_ = arena_.Matrix(types_.compute, rows_, config_.ffn);
    } else if (config_.qk_norm && least < Retain::kAll) {
      shared_qk_ = TakeQk();
    }
  }
  TensorView mlp_act() const { return mlp_act_; }

  // What a layer has of its own, and what it shares.
  void Keep(Half half, Retain retain, LayerActivations& acts) {
    for (const Spec& spec : kSpecs) {
      if (spec.half == half && retain >= spec.from) acts.*spec.field = Take(spec, rows_);
    }
    if (half == Half::kAttention && config_.qk_norm && retain == Retain::kAll) {
      SetNormed(TakeQk(), acts);
    }
  }
  void Borrow(Half half, Retain retain, LayerActivations& acts) {
    for (size_t i = 0; i < std::size(kSpecs); ++i) {
      if (kSpecs[i].half == half && retain < kSpecs[i].from) acts.*kSpecs[i].field = shared_[i];
    }
    if (half == Half::kMlp) {
      acts.mlp_act = mlp_act_;
      acts.keeps_gate_up = retain >= Retain::kProjections;
      return;
    }
    const QkvHeads heads = SplitQkv(config_, acts.qkv);
    acts.v = heads.v;
    if (!config_.qk_norm) {
      acts.q = heads.q;
      acts.k = heads.k;
    } else if (retain < Retain::kAll) {
      SetNormed(shared_qk_, acts);
    }
  }

  // A second half of its own, whatever is retained.
  void FillTail(int64_t rows, LayerActivations& tail) {
    tail.input = arena_.Matrix(types_.residual, rows, config_.hidden);
    tail.attn_out = arena_.Matrix(types_.compute, rows, config_.q_dim());
    for (const Spec& spec : kSpecs) {
      if (spec.half == Half::kMlp) tail.*spec.field = Take(spec, rows);
    }
    tail.mlp_act = mlp_act_.Rows(0, rows);
    tail.output = tail.input;  // which nobody reads after mid
  }

 private:
  TensorView Take(const Spec& spec, int64_t rows) {
    const DType dtype = TypeOf(spec.kind);
    const int64_t columns = spec.columns(config_);
    return columns == 1 ? arena_.Vector(dtype, rows) : arena_.Matrix(dtype, rows, columns);
  }
  DType TypeOf(Kind kind) const {
    if (kind == Kind::kF32) return DType::kF32;
    return kind == Kind::kResidual ? types_.residual : types_.compute;
  }

  // q, k, v are columns of qkv; with qk-norm the normed q and k are tensors of their own, since
  // backward reads both.
  void SetNormed(const TensorView& normed, LayerActivations& acts) const {
    acts.q = normed.Cols(0, config_.q_dim()).SplitHeads(config_.q_heads, config_.head_dim);
    acts.k =
        normed.Cols(config_.q_dim(), normed.dim(1)).SplitHeads(config_.kv_heads, config_.head_dim);
  }
  TensorView TakeQk() {
    return arena_.Matrix(types_.compute, rows_, config_.q_dim() + config_.kv_dim());
  }

  const ModelConfig& config_;
  ops::ActivationTypes types_;
  int64_t rows_;
  Arena& arena_;
  TensorView shared_[std::size(kSpecs)];
  TensorView shared_qk_;
  TensorView mlp_act_;
};

}  // namespace

const char* Name(Retain retain) {
  constexpr const char* kNames[] = {"nothing", "prompt", "inputs", "lean", "projections", "all"};
  return kNames[static_cast<int>(retain)];
}

std::string Retention::ToString(int64_t num_layers) const {
  const std::string rest = absl::StrCat(Name(level), "=", num_layers - num_better);
  return num_better == 0 ? rest : absl::StrCat(Name(of(0)), "=", num_better, " ", rest);
}

// First what is read again below a layer's attention, then the layers from the first one on, each
// with its second half last, then what is not read again: so a workspace is one piece, and spare
// bytes are at the end.
int64_t Activations::LayOut(const ModelConfig& config, const ops::ActivationTypes& types,
                            int64_t rows, int64_t head_rows, Retention retention,
                            int64_t spare_bytes, void* base) {
  Arena arena(base);
  Layout layout(config, types, rows, arena);
  const int64_t last = config.num_layers - 1;
  const bool backward = retention.level != Retain::kNothing;
  const DType f = types.compute;
  gradients_ = {};
  if (backward) {
    gradients_.residual = arena.Matrix(f, rows, config.hidden);
    gradients_.attn_out = arena.Matrix(f, rows, config.q_dim());
    gradients_.qkv = arena.Matrix(f, rows, config.qkv_dim());
  }
  layout.Share(Half::kAttention, retention.of(last));

  layers_.assign(config.num_layers, {});
  std::vector<int64_t> free_begin;  // [num_layers]
  for (int64_t l = 0; l <= last; ++l) {
    layout.Keep(Half::kAttention, retention.of(l), layers_[l]);
    layout.Borrow(Half::kAttention, retention.of(l), layers_[l]);
    if (l > 0) layers_[l - 1].output = layers_[l].input;
    free_begin.push_back(arena.size_bytes());
    if (l < last) layout.Keep(Half::kMlp, retention.of(l), layers_[l]);
  }
  layout.Share(Half::kMlp, last > 0 ? retention.of(last - 1) : Retain::kAll);
  for (int64_t l = 0; l < last; ++l) layout.Borrow(Half::kMlp, retention.of(l), layers_[l]);
  tail_ = {};
  layout.FillTail(head_rows, tail_);
  tail_.keeps_gate_up = backward;
  hidden_ = arena.Matrix(f, head_rows, config.hidden);
  hidden_rstd_ = arena.Vector(DType::kF32, head_rows);
  if (backward) {
    gradients_.normed = arena.Matrix(f, rows, config.hidden);
    gradients_.mlp_act = layout.mlp_act();
    gradients_.tail_residual = arena.Matrix(f, head_rows, config.hidden);
    gradients_.tail_attn_out = arena.Matrix(f, head_rows, config.q_dim());
  }
  spare_ = arena.Vector(DType::kU8, spare_bytes);
  workspaces_.clear();
  for (const int64_t begin : free_begin) {
    void* const data = base == nullptr ? nullptr : static_cast<char*>(base) + begin;
    workspaces_.push_back(View1D(data, DType::kU8, arena.size_bytes() - begin));
  }
  return arena.size_bytes();
}

int64_t Activations::SizeBytes(const ModelConfig& config, const ops::ActivationTypes& types,
                               int64_t rows, int64_t head_rows, Retention retention,
                               int64_t workspace_bytes) {
  Activations counted;
  const int64_t bytes = counted.LayOut(config, types, rows, head_rows, retention, 0, nullptr);
  const int64_t least = counted.workspaces_.back().num_bytes();
  return bytes + std::max<int64_t>(0, workspace_bytes - least);
}

Retention Activations::Choose(const ModelConfig& config, const ops::ActivationTypes& types,
                              int64_t rows, int64_t head_rows, int64_t budget_bytes,
                              int64_t workspace_bytes) {
  const auto fits = [&](const Retention& retention) {
    return SizeBytes(config, types, rows, head_rows, retention, workspace_bytes) <= budget_bytes;
  };
  Retention best(Retain::kAll);
  while (best.level > Retain::kInputs && !fits(best)) {
    best.level = static_cast<Retain>(static_cast<int>(best.level) - 1);
  }
  if (best.level == Retain::kAll) return best;
  int64_t too_many = config.num_layers;  // more never take less memory
  while (too_many - best.num_better > 1) {
    const int64_t middle = (best.num_better + too_many) / 2;
    (fits({best.level, middle}) ? best.num_better : too_many) = middle;
  }
  return best;
}

int64_t Activations::MaxRows(const ModelConfig& config, const ops::ActivationTypes& types,
                             int64_t budget_bytes) {
  // Sizes are linear in rows up to alignment, which this many rows drown.
  constexpr int64_t kProbe = 4096;
  const int64_t probe = SizeBytes(config, types, kProbe, kProbe, Retain::kInputs);
  return static_cast<int64_t>(static_cast<double>(budget_bytes) / static_cast<double>(probe) *
                              kProbe);
}

void Activations::Place(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows,
                        int64_t head_rows, Retention retention, int64_t size_bytes, void* base) {
  retention_ = retention;
  const int64_t spare = size_bytes - SizeBytes(config, types, rows, head_rows, retention);
  CHECK_GE(spare, 0) << "activation memory";
  LayOut(config, types, rows, head_rows, retention, spare / Arena::kAlignment * Arena::kAlignment,
         base);
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
