// Parameters: all trainable tensors of a model as views into one flat arena, in a fixed order. The
// same mapping serves weights, gradients and optimizer moments, so an update or a norm is one pass
// over a flat array. q, k, v are merged into one matrix [qkv_dim, hidden] and gate, up into [2 *
// ffn, hidden]; every tensor starts at a multiple of 64 elements.
#pragma once

#include <string>
#include <vector>

#include "kernels/base/tensor_view.h"
#include "kernels/model/model_config.h"

namespace coppice {

struct LayerParameters {
  TensorView attn_norm;  // [hidden]
  TensorView qkv;        // [qkv_dim, hidden]
  TensorView qkv_bias;   // optional [qkv_dim]
  TensorView q_norm;     // optional [head_dim]
  TensorView k_norm;     // optional [head_dim]
  TensorView o;          // [hidden, q_dim]
  TensorView mlp_norm;   // [hidden]
  TensorView gate_up;    // [2 * ffn, hidden]
  TensorView down;       // [hidden, ffn]
};

struct Parameters {
  TensorView embedding;                 // [vocab, hidden]
  std::vector<LayerParameters> layers;  // [layers]
  TensorView final_norm;                // [hidden]
  TensorView head;                      // [vocab, hidden]; the embedding itself when tied
  TensorView flat;  // [params] everything, padding included (padding stays zero)
};

// One Hugging Face tensor name and the slice of the arena that holds it, e.g.
// "model.layers.3.self_attn.k_proj.weight" -> rows [q_dim, q_dim + kv_dim) of layers[3].qkv.
struct NamedTensor {
  std::string name;
  TensorView view;  // rank 1 or 2, contiguous
  bool decay;       // weight decay applies: matrices, not norms and biases
};

// Elements of the flat arena, padding included.
int64_t NumParameterElements(const ModelConfig& config);
// Trainable elements, padding excluded, tied head counted once.
int64_t NumParameters(const ModelConfig& config);
// Views into `base`, an arena of NumParameterElements(config) elements of `dtype`.
Parameters MapParameters(const ModelConfig& config, void* base, DType dtype);
// All tensors by their Hugging Face names, in arena order. A tied head is not listed.
std::vector<NamedTensor> HfTensors(const ModelConfig& config, const Parameters& params);

}  // namespace coppice
