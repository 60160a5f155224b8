// Loads a model for serving and training: configuration, weights into one arena on the device,
// tokenizer.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"
#include "kernels/base/dtype.h"
#include "kernels/model/model_config.h"
#include "kernels/model/parameters.h"
#include "kernels/model/tokenizer.h"
#include "kernels/ops/ops.h"

namespace coppice {

// Owns the weights. `params` are views into `arena`, dtype = ops.Info().compute_dtype.
struct Model {
  ModelConfig config;
  DeviceBuffer arena;
  Parameters params;
  std::unique_ptr<Tokenizer> tokenizer;  // null if random or without tokenizer.json
  std::string chat_template;  // jinja2 source, empty if the model ships none; applied by clients
};

// `path`: a GGUF file, or a Hugging Face directory (config.json + *.safetensors [+ tokenizer.json,
// tokenizer_config.json]). NOT_FOUND, DATA_LOSS, UNIMPLEMENTED (architecture) and INVALID_ARGUMENT
// (shape: tensor, want, got).
absl::StatusOr<Model> LoadModel(absl::string_view path, ops::Ops& ops);

// A type to compute in, and why: "weights stored as q8_0, q4_1".
struct ComputeType {
  DType dtype = DType::kBF16;
  std::string because;
};

// The 16-bit type that is a checkpoint's own: what ours name (kComputeTypeField). bf16 if one of
// its matrices, or its config.json, is in bf16: what it was trained in, so that its activations may
// leave the range of f16. Else f16: weights that were f16, f32 or quantised keep 11 bits in it
// where bf16 keeps 8. Reads the header only. Errors as LoadModel.
absl::StatusOr<ComputeType> ComputeTypeOf(absl::string_view path);

// Random weights, normal(0, 0.02), norms 1, seeded. For benchmarks and tests; no tokenizer.
absl::StatusOr<Model> RandomModel(const ModelConfig& config, uint64_t seed, ops::Ops& ops);

}  // namespace coppice
