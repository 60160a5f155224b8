#include "trainer/forward.h"

#include <utility>

#include "kernels/base/status_macros.h"
#include "trainer/host_view.h"

namespace coppice {
namespace {

// First half of the last layer: all rows have keys and values, those behind the stem attend.
absl::Status LastAttentionForward(const Decoder& decoder, const LayerParameters& params,
                                  const ops::BatchPlan& plan, const ops::PagedKv& kv,
                                  const LayerActivations& acts, const StemLink& stem) {
  if (stem.behind == nullptr) return decoder.AttentionForward(params, plan, kv, acts);
  RETURN_IF_ERROR(decoder.QkvForward(params, plan, kv, acts));
  ops::Ops& ops = decoder.ops();
  const ModelConfig& config = decoder.config();
  if (stem.own) {
    for (const auto& [rows, pages] :
         {std::pair(acts.k, stem.pages.kv.k), {acts.v, stem.pages.kv.v}}) {
      RETURN_IF_ERROR(
          ops.Copy(MergeHeads(rows.Rows(0, stem.rows)), FlattenPages(pages, stem.rows)));
    }
  }
  // Where the pages are the tree's own, QkvForward has just written them. `behind` is used here for
  // the first time, so that its plan is uploaded in between: attention never starts too early.
  const int64_t rows = plan.batch().num_rows();
  return ops.TreeAttention(
      {.plan = stem.behind,
       .q = acts.q.Rows(stem.rows, rows),
       .k = acts.k.Rows(stem.rows, rows),
       .v = acts.v.Rows(stem.rows, rows),
       .context = stem.pages.kv,
       .scale = config.attention_scale(),
       .out = acts.attn_out.Rows(stem.rows, rows).SplitHeads(config.q_heads, config.head_dim),
       .lse = acts.lse.Rows(stem.rows, rows)});
}

}  // namespace

absl::Status ForwardTree(const Decoder& decoder, const Parameters& params,
                         const ops::BatchPlan& plan, const Activations& acts,
                         const PromptLink& link, const StemLink& stem) {
  ops::Ops& ops = decoder.ops();
  const int64_t last = decoder.config().num_layers - 1;
  RETURN_IF_ERROR(
      ops.Embedding({.ids = plan.tokens(), .table = params.embedding, .out = acts.layer(0).input}));
  for (int64_t l = 0; l < last; ++l) {
    RETURN_IF_ERROR(
        decoder.AttentionForward(params.layers[l], plan, link.Context(l), acts.layer(l)));
    RETURN_IF_ERROR(decoder.MlpForward(params.layers[l], acts.layer(l)));
  }
  return LastAttentionForward(decoder, params.layers[last], plan, link.Context(last),
                              acts.layer(last), stem);
}

absl::Status ForwardTail(const Decoder& decoder, const Parameters& params,
                         const ops::BatchPlan& plan, const Activations& acts) {
  ops::Ops& ops = decoder.ops();
  const int64_t last = decoder.config().num_layers - 1;
  const LayerActivations& body = acts.layer(last);
  const LayerActivations& tail = acts.tail();
  RETURN_IF_ERROR(
      ops.GatherRows({.src = body.input, .indices = plan.logit_rows(), .out = tail.input}));
  RETURN_IF_ERROR(
      ops.GatherRows({.src = body.attn_out, .indices = plan.logit_rows(), .out = tail.attn_out}));
  RETURN_IF_ERROR(decoder.MlpForward(params.layers[last], tail));
  return ops.RmsNorm({.x = tail.output,
                      .weight = params.final_norm,
                      .eps = decoder.config().rms_eps,
                      .out = acts.hidden(),
                      .rstd = acts.hidden_rstd()});
}

absl::Status HeadForward(ops::Ops& ops, const Parameters& params, const TokenTree& tree,
                         float temperature, const Activations& acts, HeadOutputs& out) {
  out.logprobs.resize(tree.targets.size());
  out.entropy.resize(tree.num_head_rows());
  out.lse.resize(tree.num_head_rows());
  return ops.LogProbHead({.hidden = acts.hidden(),
                          .weight = params.head,
                          .target_indptr = HostView(tree.target_indptr),
                          .targets = HostView(tree.targets),
                          .temperature = temperature,
                          .logprobs = HostView(out.logprobs),
                          .entropy = HostView(out.entropy),
                          .lse = HostView(out.lse),
                          .kept = out.lent});
}

}  // namespace coppice
