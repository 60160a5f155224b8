// A GGUF file seen as a Hugging Face model: configuration from metadata, tensors under Hugging
// Face's names, and the rows of Llama's q and k projections put back in order (llama.cpp's
// converter interleaves the two halves of each head, since its Llama RoPE rotates neighbouring
// pairs; ours rotates halves).
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/model/gguf.h"
#include "kernels/model/model_config.h"
#include "kernels/model/tensor_source.h"

namespace coppice {

// UNIMPLEMENTED for another architecture, listing what exists.
absl::StatusOr<ModelConfig> ParseGgufConfig(const GgufFile& file);

// Borrows `file`. Tensors that are no weights (rope_freqs) are not listed.
absl::StatusOr<std::unique_ptr<TensorSource>> MakeGgufTensorSource(const GgufFile& file,
                                                                   const ModelConfig& config);

}  // namespace coppice
