// Shape of a decoder: Llama, Qwen2 or Qwen3 (dense). Read from config.json or GGUF metadata, or
// named for benchmarks.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace coppice {

enum class Architecture { kLlama, kQwen2, kQwen3 };

// Frequencies of rotary positions. kLlama3: Meta's wavelength-dependent scaling, as in transformers
// modeling_rope_utils.
struct RopeConfig {
  enum class Scaling { kNone, kLinear, kLlama3 };
  double theta = 10000.0;
  Scaling scaling = Scaling::kNone;
  double factor = 1.0;
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // llama3
  int64_t original_max_positions = 8192;                 // llama3
};

struct ModelConfig {
  std::string name;
  Architecture architecture = Architecture::kLlama;
  int64_t num_layers = 0;
  int64_t hidden = 0;
  int64_t q_heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t ffn = 0;
  int64_t vocab = 0;
  int64_t max_positions = 0;
  float rms_eps = 1e-5f;
  RopeConfig rope;
  bool tied_head = false;  // the head is the embedding
  bool qkv_bias = false;   // Qwen2
  bool qk_norm = false;    // Qwen3
  int32_t bos_token = -1;  // -1 = none
  std::vector<int32_t> eos_tokens;

  int64_t q_dim() const { return q_heads * head_dim; }
  int64_t kv_dim() const { return kv_heads * head_dim; }
  int64_t qkv_dim() const { return q_dim() + 2 * kv_dim(); }
  float attention_scale() const;  // 1 / sqrt(head_dim)

  // INVALID_ARGUMENT naming the field that makes no sense (zero sizes, q_heads not a multiple of
  // kv_heads, odd head_dim...).
  absl::Status Validate() const;
  // One line: "llama layers=30 hidden=576 heads=9/3x64 ffn=1536 vocab=49152 params=134.5M".
  std::string ToString() const;
};

// Field of a config.json that we wrote: the 16-bit type its policy was computed in, "bf16" or
// "f16".
constexpr char kComputeTypeField[] = "coppice_compute_dtype";

// Parses the text of a Hugging Face config.json. INVALID_ARGUMENT with the field; UNIMPLEMENTED for
// an unknown architecture or rope scaling, listing what exists.
absl::StatusOr<ModelConfig> ParseHfConfig(absl::string_view json);

// Benchmarks' geometries: "smollm2-135m", "qwen3-4b", "tiny-llama", "tiny-qwen2", "tiny-qwen3".
// NOT_FOUND lists them.
absl::StatusOr<ModelConfig> NamedGeometry(absl::string_view name);

}  // namespace coppice
