#include "trainer/forward.h"

#include "kernels/base/status_macros.h"
#include "trainer/host_view.h"

namespace coppice {

absl::Status ForwardTree(const Decoder& decoder, const Parameters& params,
                         const ops::BatchPlan& plan, const Activations& acts,
                         const PromptLink& link) {
  ops::Ops& ops = decoder.ops();
  const int64_t last = decoder.config().num_layers - 1;
  RETURN_IF_ERROR(
      ops.Embedding({.ids = plan.tokens(), .table = params.embedding, .out = acts.layer(0).input}));
  for (int64_t l = 0; l <= last; ++l) {
    RETURN_IF_ERROR(
        decoder.AttentionForward(params.layers[l], plan, link.Context(l), acts.layer(l)));
    if (l < last) RETURN_IF_ERROR(decoder.MlpForward(params.layers[l], acts.layer(l)));
  }
  return absl::OkStatus();
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
                          .lse = HostView(out.lse)});
}

}  // namespace coppice
