// The start-up self-test of deterministic mode: runs the model's own shapes and demands that a
// row's logits have the same bits however it is computed - in one batch with its whole prefix, as
// the last of M rows over a cached prefix, or as a decode row among N others.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/model/decoder.h"
#include "kernels/model/parameters.h"

namespace coppice {

// INTERNAL naming the first batch whose bits differ. Costs a forward pass of 640 tokens and a dozen
// smaller ones, and memory for their KV and logits, freed on return.
absl::Status CheckRowEquality(const Decoder& decoder, const Parameters& params,
                              int64_t block_tokens);

}  // namespace coppice
