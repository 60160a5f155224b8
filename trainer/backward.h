// The backward pass: every op call of the forward pass mirrored, in reverse. What the forward pass
// did not retain is recomputed layer by layer. Weight gradients are added to `grads`, or with
// `accumulate` = false written over whatever is there, which saves zeroing and reading them.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "kernels/model/decoder.h"
#include "trainer/activations.h"
#include "trainer/forward.h"
#include "trainer/token_tree.h"

namespace coppice {

// Derivatives of the loss by what the head returned, summed over samples. Host memory.
struct HeadGradients {
  std::vector<float> d_logprobs;  // [targets]
  std::vector<float> d_entropy;   // [head_rows]; empty = none
};

// From the log-probs to the output of the last layer on the head rows.
absl::Status HeadBackward(ops::Ops& ops, const Parameters& params, const TokenTree& tree,
                          float temperature, const HeadOutputs& head, const HeadGradients& d_head,
                          const Activations& acts, const Parameters& grads, bool accumulate);

// From there to the embedding. REQUIRES: HeadBackward of the same pass; the activations are
// consumed. Branches add to link.gradients, the prompt's own tree takes them in. `stem` as forward.
absl::Status BackwardTree(const Decoder& decoder, const Parameters& params,
                          const ops::BatchPlan& plan, const Activations& acts,
                          const Parameters& grads, bool accumulate, const PromptLink& link = {},
                          const StemLink& stem = {});

}  // namespace coppice
