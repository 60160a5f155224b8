#include "trainer/backward.h"

#include "kernels/base/status_macros.h"
#include "trainer/host_view.h"

namespace coppice {
namespace {

// Where gradients of parameters go: added to what is there, or written over it.
struct GradientSink {
  const LayerParameters& grads;
  bool accumulate;
};

// y = x w^T:  d_w += d_y^T x  (or =).
absl::Status WeightGradient(ops::Ops& ops, TensorView d_y, TensorView x, TensorView d_w,
                            bool accumulate) {
  return ops.MatMul(
      {.a = d_y, .b = x, .trans_a = true, .addend = accumulate ? d_w : TensorView{}, .c = d_w});
}

// Of the same:  d_x = d_y w.
absl::Status InputGradient(ops::Ops& ops, TensorView d_y, TensorView w, TensorView d_x) {
  return ops.MatMul({.a = d_y, .b = w, .c = d_x});
}

// Both.
absl::Status LinearBackward(ops::Ops& ops, TensorView d_y, TensorView x, TensorView w,
                            TensorView d_w, bool accumulate, TensorView d_x) {
  RETURN_IF_ERROR(WeightGradient(ops, d_y, x, d_w, accumulate));
  return InputGradient(ops, d_y, w, d_x);
}

// Buffers of one half's backward; `residual` holds the gradient leaving the half and, after, the
// one entering it.
struct HalfGradients {
  TensorView residual;  // [rows, hidden] f
  TensorView normed;    // [rows, hidden] f
  TensorView attn_out;  // [rows, q_dim] f: between the halves
  TensorView mlp_act;   // [rows, ffn] f, second half only
  // Whether acts.mlp_in is not there yet: the norm's backward writes it on its way.
  bool norm_again = false;
};

// Second half of a layer: d_output -> d_mid + d_attn_out. Consumes acts.gate_up. d.mlp_act gets the
// SwiGLU output again, for down's own gradient.
absl::Status MlpBackward(ops::Ops& ops, const LayerParameters& params, const LayerActivations& acts,
                         const GradientSink& sink, const HalfGradients& d) {
  const LayerParameters& grads = sink.grads;
  const TensorView d_gate_up = acts.gate_up;
  RETURN_IF_ERROR(ops.MatMulSwiGluBackward({.d_y = d.residual,
                                            .b = params.down,
                                            .gate_up = acts.gate_up,
                                            .d_gate_up = d_gate_up,
                                            .out = d.mlp_act}));
  RETURN_IF_ERROR(WeightGradient(ops, d.residual, d.mlp_act, grads.down, sink.accumulate));
  RETURN_IF_ERROR(InputGradient(ops, d_gate_up, params.gate_up, d.normed));
  RETURN_IF_ERROR(ops.RmsNormBackward({.d_out = d.normed,
                                       .x = acts.mid,
                                       .weight = params.mlp_norm,
                                       .rstd = acts.mlp_rstd,
                                       .d_x = d.residual,
                                       .accumulate_d_x = true,
                                       .d_weight = grads.mlp_norm,
                                       .out = d.norm_again ? acts.mlp_in : TensorView{}}));
  RETURN_IF_ERROR(WeightGradient(ops, d_gate_up, acts.mlp_in, grads.gate_up, sink.accumulate));
  return LinearBackward(ops, d.residual, acts.attn_out, params.o, grads.o, sink.accumulate,
                        d.attn_out);
}

// What one layer needs of a PromptLink and a StemLink.
struct LayerLink {
  ops::PagedKv context;    // absent unless the rows, or those behind the stem, are branches
  ops::PagedKv d_context;  // += of branches
  TensorView d_keys;       // [n, kv_dim] f32: what branches added, for the first n rows
  TensorView d_values;
  int64_t stem_rows = 0;  // attention runs without these
  const ops::BatchPlan* behind = nullptr;
  bool norm_again = false;  // of acts.attn_in, as of HalfGradients
};

LayerLink LinkOf(const PromptLink& link, int64_t layer) {
  if (link.gradients == nullptr) return {};
  if (link.context != nullptr) {
    return {.context = link.Context(layer), .d_context = link.gradients->pages(layer)};
  }
  return {.d_keys = link.gradients->keys(layer), .d_values = link.gradients->values(layer)};
}

// Of the last layer.
LayerLink LinkOf(const PromptLink& link, const StemLink& stem, int64_t layer) {
  LayerLink result = LinkOf(link, layer);
  if (stem.behind == nullptr) return result;
  result.context = stem.pages.kv;
  result.d_context = stem.pages.gradients;
  if (stem.own) {
    result.d_keys = FlattenPages(stem.pages.gradients.k, stem.rows);
    result.d_values = FlattenPages(stem.pages.gradients.v, stem.rows);
  }
  result.stem_rows = stem.rows;
  result.behind = stem.behind;
  return result;
}

// d += what branches added, [n, kv_dim] f32, in its first n rows; `rounded`: [rows, kv_dim] f of
// scratch.
absl::Status AddFromBranches(ops::Ops& ops, const ops::BatchPlan& plan, TensorView from_branches,
                             TensorView rounded, TensorView d) {
  if (!from_branches.present()) return absl::OkStatus();
  const int64_t rows = from_branches.dim(0);
  RETURN_IF_ERROR(ops.Copy(from_branches, rounded.Rows(0, rows)));
  // Row p of a prompt or stem is its position p.
  return ops.ScatterAddRows(
      {.src = rounded.Rows(0, rows), .indices = plan.positions().Rows(0, rows), .dst = d});
}

// d.attn_out -> d.qkv after RoPE and norms, of the rows that attend; zero of a stem, whose keys and
// values have theirs from link.d_context.
absl::Status TreeAttentionBackward(const Decoder& decoder, const ops::BatchPlan& plan,
                                   const LayerActivations& acts, const LayerLink& link,
                                   const ActivationGradients& buffers, TensorView workspace) {
  const ModelConfig& config = decoder.config();
  const int64_t begin = link.stem_rows, end = plan.batch().num_rows();
  if (begin > 0) RETURN_IF_ERROR(decoder.ops().Zero(buffers.qkv.Rows(0, begin)));
  const QkvHeads d = SplitQkv(config, buffers.qkv.Rows(begin, end));
  const auto heads = [&](const TensorView& t) {
    return t.Rows(begin, end).SplitHeads(config.q_heads, config.head_dim);
  };
  return decoder.ops().TreeAttentionBackward({.plan = begin > 0 ? link.behind : &plan,
                                              .q = acts.q.Rows(begin, end),
                                              .k = acts.k.Rows(begin, end),
                                              .v = acts.v.Rows(begin, end),
                                              .context = link.context,
                                              .scale = config.attention_scale(),
                                              .out = heads(acts.attn_out),
                                              .lse = acts.lse.Rows(begin, end),
                                              .d_out = heads(buffers.attn_out),
                                              .d_q = d.q,
                                              .d_k = d.k,
                                              .d_v = d.v,
                                              .d_context = link.d_context,
                                              .workspace = workspace});
}

// d.attn_out -> d.qkv, through attention, RoPE and the per-head norms. Consumes d.attn_out.
absl::Status QkvBackward(const Decoder& decoder, const LayerParameters& params,
                         const ops::BatchPlan& plan, const LayerActivations& acts,
                         const LayerParameters& grads, const LayerLink& link,
                         const ActivationGradients& buffers, TensorView workspace) {
  const TensorView d_attn_out = buffers.attn_out, d_qkv = buffers.qkv;
  const ModelConfig& config = decoder.config();
  RETURN_IF_ERROR(TreeAttentionBackward(decoder, plan, acts, link, buffers, workspace));
  const TensorView rounded = d_attn_out.Cols(0, config.kv_dim());
  const int64_t k_end = config.q_dim() + config.kv_dim();
  RETURN_IF_ERROR(AddFromBranches(decoder.ops(), plan, link.d_keys, rounded,
                                  d_qkv.Cols(config.q_dim(), k_end)));
  RETURN_IF_ERROR(AddFromBranches(decoder.ops(), plan, link.d_values, rounded,
                                  d_qkv.Cols(k_end, config.qkv_dim())));
  const QkvHeads in = SplitQkv(config, acts.qkv), d = SplitQkv(config, d_qkv);
  return decoder.ops().QkNormRopeBackward({.plan = &plan,
                                           .d_q_out = d.q,
                                           .d_k_out = d.k,
                                           .q_in = in.q,
                                           .k_in = in.k,
                                           .q_norm = params.q_norm,
                                           .k_norm = params.k_norm,
                                           .eps = config.rms_eps,
                                           .rope = decoder.rope(),
                                           .d_q_in = d.q,
                                           .d_k_in = d.k,
                                           .d_q_norm = grads.q_norm,
                                           .d_k_norm = grads.k_norm});
}

// First half of a layer: d_attn_out, d_mid -> d_input.
absl::Status AttentionBackward(const Decoder& decoder, const LayerParameters& params,
                               const ops::BatchPlan& plan, const LayerActivations& acts,
                               const GradientSink& sink, const LayerLink& link,
                               const ActivationGradients& d, TensorView workspace) {
  const LayerParameters& grads = sink.grads;
  ops::Ops& ops = decoder.ops();
  RETURN_IF_ERROR(QkvBackward(decoder, params, plan, acts, grads, link, d, workspace));
  if (params.qkv_bias.present()) {
    RETURN_IF_ERROR(ops.SumRows({.x = d.qkv, .out = grads.qkv_bias}));
  }
  RETURN_IF_ERROR(InputGradient(ops, d.qkv, params.qkv, d.normed));
  RETURN_IF_ERROR(ops.RmsNormBackward({.d_out = d.normed,
                                       .x = acts.input,
                                       .weight = params.attn_norm,
                                       .rstd = acts.attn_rstd,
                                       .d_x = d.residual,
                                       .accumulate_d_x = true,
                                       .d_weight = grads.attn_norm,
                                       .out = link.norm_again ? acts.attn_in : TensorView{}}));
  return WeightGradient(ops, d.qkv, acts.attn_in, grads.qkv, sink.accumulate);
}

// Norms' outputs that Rematerialize leaves to their backward.
bool AttentionNormAgain(Retain retain) {
  return retain == Retain::kLean || retain == Retain::kProjections;
}
bool MlpNormAgain(Retain retain) { return retain == Retain::kProjections; }

// Restores what was not retained.
absl::Status Rematerialize(const Decoder& decoder, const LayerParameters& params,
                           const ops::BatchPlan& plan, const ops::PagedKv& context, Retain retain,
                           const LayerActivations& acts) {
  if (retain == Retain::kAll) return absl::OkStatus();
  if (retain == Retain::kInputs) {
    RETURN_IF_ERROR(decoder.AttentionForward(params, plan, context, acts));
    return decoder.GateUpForward(params, acts);
  }
  if (retain == Retain::kPrompt) {
    RETURN_IF_ERROR(decoder.QkvForward(params, plan, {}, acts));
    return decoder.GateUpForward(params, acts);
  }
  if (decoder.config().qk_norm) RETURN_IF_ERROR(decoder.RotateForward(params, plan, {}, acts));
  return retain == Retain::kLean ? decoder.GateUpForward(params, acts) : absl::OkStatus();
}

// Norms, biases and the embedding are always added to: before the first pass they must be zero.
absl::Status ZeroAddedGradients(ops::Ops& ops, const Parameters& grads) {
  for (const LayerParameters& layer : grads.layers) {
    for (const TensorView& t :
         {layer.attn_norm, layer.qkv_bias, layer.q_norm, layer.k_norm, layer.mlp_norm}) {
      if (t.present()) RETURN_IF_ERROR(ops.Zero(t));
    }
  }
  RETURN_IF_ERROR(ops.Zero(grads.final_norm));
  // A tied embedding is written by the head first.
  return grads.embedding.data == grads.head.data ? absl::OkStatus() : ops.Zero(grads.embedding);
}

// The tail's gradients, spread from the head rows to all rows.
absl::Status ScatterTail(ops::Ops& ops, const ops::BatchPlan& plan, const ActivationGradients& d) {
  RETURN_IF_ERROR(ops.Zero(d.residual));
  RETURN_IF_ERROR(ops.ScatterAddRows(
      {.src = d.tail_residual, .indices = plan.logit_rows(), .dst = d.residual}));
  RETURN_IF_ERROR(ops.Zero(d.attn_out));
  return ops.ScatterAddRows(
      {.src = d.tail_attn_out, .indices = plan.logit_rows(), .dst = d.attn_out});
}

}  // namespace

absl::Status HeadBackward(ops::Ops& ops, const Parameters& params, const TokenTree& tree,
                          float temperature, const HeadOutputs& head, const HeadGradients& d_head,
                          const Activations& acts, const Parameters& grads, bool accumulate) {
  if (!accumulate) RETURN_IF_ERROR(ZeroAddedGradients(ops, grads));
  const ActivationGradients& d = acts.gradients();
  const TensorView d_hidden = d.normed.Rows(0, tree.num_head_rows());
  RETURN_IF_ERROR(ops.LogProbHeadBackward(
      {.hidden = acts.hidden(),
       .weight = params.head,
       .target_indptr = HostView(tree.target_indptr),
       .targets = HostView(tree.targets),
       .temperature = temperature,
       .lse = HostView(head.lse),
       .entropy = HostView(head.entropy),
       .d_logprobs = HostView(d_head.d_logprobs),
       .d_entropy = d_head.d_entropy.empty() ? TensorView{} : HostView(d_head.d_entropy),
       .d_hidden = d_hidden,
       .d_weight = grads.head,
       .accumulate_d_weight = accumulate,
       .kept = head.lent}));
  return ops.RmsNormBackward({.d_out = d_hidden,
                              .x = acts.tail().output,
                              .weight = params.final_norm,
                              .rstd = acts.hidden_rstd(),
                              .d_x = d.tail_residual,
                              .d_weight = grads.final_norm});
}

absl::Status BackwardTree(const Decoder& decoder, const Parameters& params,
                          const ops::BatchPlan& plan, const Activations& acts,
                          const Parameters& grads, bool accumulate, const PromptLink& link,
                          const StemLink& stem) {
  ops::Ops& ops = decoder.ops();
  const ActivationGradients& d = acts.gradients();
  const int64_t head_rows = d.tail_residual.dim(0);
  const int64_t last = decoder.config().num_layers - 1;

  // The tail has activations of its own.
  RETURN_IF_ERROR(MlpBackward(ops, params.layers[last], acts.tail(),
                              {.grads = grads.layers[last], .accumulate = accumulate},
                              {.residual = d.tail_residual,
                               .normed = d.normed.Rows(0, head_rows),
                               .attn_out = d.tail_attn_out,
                               .mlp_act = d.mlp_act.Rows(0, head_rows)}));
  RETURN_IF_ERROR(ScatterTail(ops, plan, d));
  if (stem.own) {
    RETURN_IF_ERROR(ops.Zero(stem.pages.gradients.k));
    RETURN_IF_ERROR(ops.Zero(stem.pages.gradients.v));
  }
  for (int64_t l = last; l >= 0; --l) {
    const LayerParameters& weights = params.layers[l];
    const LayerActivations& layer = acts.layer(l);
    const Retain retain = acts.retention().of(l);
    LayerLink layer_link = l < last ? LinkOf(link, l) : LinkOf(link, stem, l);
    const GradientSink sink = {.grads = grads.layers[l], .accumulate = accumulate};
    if (l < last) {
      RETURN_IF_ERROR(Rematerialize(decoder, weights, plan, layer_link.context, retain, layer));
      layer_link.norm_again = AttentionNormAgain(retain);
      RETURN_IF_ERROR(MlpBackward(ops, weights, layer, sink,
                                  {.residual = d.residual,
                                   .normed = d.normed,
                                   .attn_out = d.attn_out,
                                   .mlp_act = d.mlp_act,
                                   .norm_again = MlpNormAgain(retain)}));
    } else if (acts.retention().level == Retain::kPrompt) {
      RETURN_IF_ERROR(decoder.QkvForward(weights, plan, {}, layer));
    }  // else nobody overwrote what its first half left in the shared buffers
    RETURN_IF_ERROR(
        AttentionBackward(decoder, weights, plan, layer, sink, layer_link, d, acts.workspace(l)));
  }
  return ops.EmbeddingBackward(
      {.ids = plan.tokens(), .d_out = d.residual, .d_table = grads.embedding});
}

}  // namespace coppice
