// The forward pass of training and scoring: one code path, the same ops in the same order, so that
// log-probs of both agree bit for bit.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "kernels/model/decoder.h"
#include "trainer/activations.h"
#include "trainer/stem.h"
#include "trainer/token_tree.h"

namespace coppice {

// Per unique token: what the loss reads and what the head's backward needs. Host memory.
struct HeadOutputs {
  std::vector<float> logprobs;  // [targets]
  std::vector<float> entropy;   // [head_rows]
  std::vector<float> lse;       // [head_rows]
  // Device memory that the head's forward may leave something in for its backward; absent: none.
  TensorView lent;
};

// Embedding and layers, up to the attention of the last one. Keys and values are stored into
// link.context and read from it as the plan says. The stem's rows get no attn_out in the last
// layer. REQUIRES: acts.Place for this plan.
absl::Status ForwardTree(const Decoder& decoder, const Parameters& params,
                         const ops::BatchPlan& plan, const Activations& acts,
                         const PromptLink& link = {}, const StemLink& stem = {});

// The rest of the last layer on the head rows, and the final norm; leaves acts.hidden(). REQUIRES:
// at least one head row.
absl::Status ForwardTail(const Decoder& decoder, const Parameters& params,
                         const ops::BatchPlan& plan, const Activations& acts);

// Log-probs of the tree's targets at `temperature`, from acts.hidden().
absl::Status HeadForward(ops::Ops& ops, const Parameters& params, const TokenTree& tree,
                         float temperature, const Activations& acts, HeadOutputs& out);

}  // namespace coppice
