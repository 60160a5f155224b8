// The start-up test of every daemon: a device that lacks a kernel for the model, or memory for a
// block of one, refuses at start and not with the first request.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/model/decoder.h"
#include "kernels/model/parameters.h"

namespace coppice {

// Runs one row as prefill and one behind it as decode, logits included. UNIMPLEMENTED where an op
// has no kernel for the model's shape on this device, else the errors of Ops. Costs two decode
// steps of one row and memory for two KV blocks and their logits, freed on return.
absl::Status CheckModelRuns(const Decoder& decoder, const Parameters& params, int64_t block_tokens);

}  // namespace coppice
