#include "kernels/model/model_config.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/json_fields.h"
#include "kernels/model/parameters.h"

namespace coppice {
namespace {

constexpr int64_t kMaxTokenId = int64_t{1} << 24;
constexpr double kMaxParameters = 1e13;  // keeps every product of sizes inside int64

const char* ArchitectureName(Architecture a) {
  switch (a) {
    case Architecture::kLlama:
      return "llama";
    case Architecture::kQwen2:
      return "qwen2";
    case Architecture::kQwen3:
      return "qwen3";
  }
  return "?";
}

absl::Status CheckRange(const char* field, int64_t value, int64_t max) {
  if (value >= 1 && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("model config field ", field,
                                                 " out of range: want 1..", max, ", got ", value,
                                                 "; check the model's files"));
}

absl::Status ReadRopeScaling(const nlohmann::json& scaling, RopeConfig& rope) {
  std::string type = "default";
  RETURN_IF_ERROR(ReadString(scaling, "type", type));
  RETURN_IF_ERROR(ReadString(scaling, "rope_type", type));
  RETURN_IF_ERROR(ReadDouble(scaling, "rope_theta", rope.theta));
  RETURN_IF_ERROR(ReadDouble(scaling, "factor", rope.factor));
  RETURN_IF_ERROR(ReadDouble(scaling, "low_freq_factor", rope.low_freq_factor));
  RETURN_IF_ERROR(ReadDouble(scaling, "high_freq_factor", rope.high_freq_factor));
  RETURN_IF_ERROR(
      ReadInt(scaling, "original_max_position_embeddings", rope.original_max_positions));
  if (type == "default") {
    rope.scaling = RopeConfig::Scaling::kNone;
  } else if (type == "linear") {
    rope.scaling = RopeConfig::Scaling::kLinear;
  } else if (type == "llama3") {
    rope.scaling = RopeConfig::Scaling::kLlama3;
  } else {
    return absl::UnimplementedError(
        absl::StrCat("rope scaling ", type, ": want one of default, linear, llama3"));
  }
  return absl::OkStatus();
}

// transformers 5 writes rope_parameters; before, rope_theta with an optional rope_scaling.
absl::Status ReadRope(const nlohmann::json& root, RopeConfig& rope) {
  RETURN_IF_ERROR(ReadDouble(root, "rope_theta", rope.theta));
  double partial = 1.0;
  RETURN_IF_ERROR(ReadDouble(root, "partial_rotary_factor", partial));
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const nlohmann::json* scaling = FindField(root, key);
    if (scaling == nullptr) continue;
    if (!scaling->is_object()) {
      return absl::InvalidArgumentError(
          absl::StrCat("json field ", key, ": want an object, got ", scaling->type_name()));
    }
    RETURN_IF_ERROR(ReadRopeScaling(*scaling, rope));
    RETURN_IF_ERROR(ReadDouble(*scaling, "partial_rotary_factor", partial));
  }
  if (partial != 1.0) {
    return absl::UnimplementedError(
        absl::StrCat("partial_rotary_factor: want 1 (all of head_dim rotates), got ", partial));
  }
  return absl::OkStatus();
}

absl::Status ReadArchitecture(const nlohmann::json& root, ModelConfig& config) {
  std::string type;
  RETURN_IF_ERROR(ReadString(root, "model_type", type));
  if (type == "llama") {
    config.architecture = Architecture::kLlama;
  } else if (type == "qwen2") {
    config.architecture = Architecture::kQwen2;
    config.qkv_bias = true;
  } else if (type == "qwen3") {
    config.architecture = Architecture::kQwen3;
    config.qk_norm = true;
  } else {
    return absl::UnimplementedError(absl::StrCat(
        "model architecture \"", type, "\" (model_type): want one of llama, qwen2, qwen3"));
  }
  return absl::OkStatus();
}

// Switches of the three families that we do not run.
absl::Status RejectUnsupported(const nlohmann::json& root) {
  for (const char* key : {"attention_bias", "mlp_bias", "use_sliding_window"}) {
    bool on = false;
    RETURN_IF_ERROR(ReadBool(root, key, on));
    if (on) return absl::UnimplementedError(absl::StrCat("model config ", key, ": want false"));
  }
  std::string activation = "silu";
  RETURN_IF_ERROR(ReadString(root, "hidden_act", activation));
  if (activation != "silu") {
    return absl::UnimplementedError(absl::StrCat("hidden_act: want silu, got ", activation));
  }
  return absl::OkStatus();
}

absl::Status ReadTokenIds(const nlohmann::json& root, ModelConfig& config) {
  int64_t bos = -1;
  RETURN_IF_ERROR(ReadInt(root, "bos_token_id", bos));
  if (bos < -1 || bos >= kMaxTokenId) bos = -1;
  config.bos_token = static_cast<int32_t>(bos);
  const nlohmann::json* eos = FindField(root, "eos_token_id");
  if (eos == nullptr) return absl::OkStatus();
  const nlohmann::json list = eos->is_array() ? *eos : nlohmann::json::array({*eos});
  for (const nlohmann::json& id : list) {
    if (!id.is_number_integer() || id < 0 || id >= kMaxTokenId) {
      return absl::InvalidArgumentError("json field eos_token_id: want token ids from 0");
    }
    config.eos_tokens.push_back(id.get<int32_t>());
  }
  return absl::OkStatus();
}

ModelConfig SmolLm2() {
  ModelConfig c;
  c.name = "smollm2-135m";
  c.num_layers = 30;
  c.hidden = 576;
  c.q_heads = 9;
  c.kv_heads = 3;
  c.head_dim = 64;
  c.ffn = 1536;
  c.vocab = 49152;
  c.max_positions = 8192;
  c.rope.theta = 100000.0;
  c.tied_head = true;
  c.bos_token = 1;
  c.eos_tokens = {2};
  return c;
}

ModelConfig Qwen3_4b() {
  ModelConfig c;
  c.name = "qwen3-4b";
  c.architecture = Architecture::kQwen3;
  c.num_layers = 36;
  c.hidden = 2560;
  c.q_heads = 32;
  c.kv_heads = 8;
  c.head_dim = 128;
  c.ffn = 9728;
  c.vocab = 151936;
  c.max_positions = 40960;
  c.rms_eps = 1e-6f;
  c.rope.theta = 1e6;
  c.tied_head = true;
  c.qk_norm = true;
  c.bos_token = 151643;
  c.eos_tokens = {151645};
  return c;
}

ModelConfig Tiny(absl::string_view name, Architecture architecture) {
  ModelConfig c;
  c.name = std::string(name);
  c.architecture = architecture;
  c.num_layers = 2;
  c.hidden = 64;
  c.q_heads = 4;
  c.kv_heads = 2;
  c.head_dim = 64;  // the smallest that every device has kernels for
  c.ffn = 160;
  c.vocab = 300;
  c.max_positions = 4096;
  c.tied_head = architecture == Architecture::kQwen2;
  c.qkv_bias = architecture == Architecture::kQwen2;
  c.qk_norm = architecture == Architecture::kQwen3;
  c.bos_token = 1;
  c.eos_tokens = {2};
  return c;
}

}  // namespace

float ModelConfig::attention_scale() const {
  return 1.0f / std::sqrt(static_cast<float>(head_dim));
}

absl::Status ModelConfig::Validate() const {
  RETURN_IF_ERROR(CheckRange("num_layers", num_layers, 4096));
  RETURN_IF_ERROR(CheckRange("hidden", hidden, 1 << 20));
  RETURN_IF_ERROR(CheckRange("q_heads", q_heads, 1 << 12));
  RETURN_IF_ERROR(CheckRange("kv_heads", kv_heads, 1 << 12));
  RETURN_IF_ERROR(CheckRange("head_dim", head_dim, 1 << 12));
  RETURN_IF_ERROR(CheckRange("ffn", ffn, 1 << 22));
  RETURN_IF_ERROR(CheckRange("vocab", vocab, kMaxTokenId));
  RETURN_IF_ERROR(CheckRange("max_positions", max_positions, 1 << 24));
  if (q_heads % kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "model config field q_heads: want a multiple of kv_heads=", kv_heads, ", got ", q_heads));
  }
  if (head_dim % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("model config field head_dim: want an even number, got ", head_dim));
  }
  if (!(rms_eps >= 0) || !std::isfinite(rms_eps)) {
    return absl::InvalidArgumentError(
        absl::StrCat("model config field rms_eps: want a finite number >= 0, got ", rms_eps));
  }
  const double weights =
      static_cast<double>(num_layers) * hidden * (qkv_dim() + q_dim() + 3 * ffn) +
      2.0 * vocab * hidden;
  if (weights > kMaxParameters) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "model config too large: want at most %.0e parameters, got %.3e", kMaxParameters, weights));
  }
  const bool rope_ok = rope.theta > 0 && rope.factor > 0 && rope.low_freq_factor > 0 &&
                       rope.high_freq_factor > 0 && rope.original_max_positions > 0 &&
                       std::isfinite(rope.theta) && std::isfinite(rope.factor) &&
                       (rope.scaling != RopeConfig::Scaling::kLlama3 ||
                        rope.high_freq_factor > rope.low_freq_factor);
  if (!rope_ok) {
    return absl::InvalidArgumentError(absl::StrCat(
        "model config field rope: want positive theta, factor and positions and high_freq_factor > "
        "low_freq_factor, got theta=",
        rope.theta, " factor=", rope.factor, " low=", rope.low_freq_factor,
        " high=", rope.high_freq_factor, " original_max_positions=", rope.original_max_positions));
  }
  for (const int32_t eos : eos_tokens) {
    if (eos < 0 || eos >= vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("model config field eos_tokens: want ids in [0, ", vocab, "), got ", eos));
    }
  }
  return absl::OkStatus();
}

std::string ModelConfig::ToString() const {
  return absl::StrFormat("%s layers=%d hidden=%d heads=%d/%dx%d ffn=%d vocab=%d params=%.1fM",
                         ArchitectureName(architecture), num_layers, hidden, q_heads, kv_heads,
                         head_dim, ffn, vocab, NumParameters(*this) / 1e6);
}

absl::StatusOr<ModelConfig> ParseHfConfig(absl::string_view json) {
  ASSIGN_OR_RETURN(const nlohmann::json root, ParseJsonObject(json, "config.json"));
  ModelConfig c;
  RETURN_IF_ERROR(ReadArchitecture(root, c));
  RETURN_IF_ERROR(RejectUnsupported(root));
  RETURN_IF_ERROR(ReadInt(root, "num_hidden_layers", c.num_layers));
  RETURN_IF_ERROR(ReadInt(root, "hidden_size", c.hidden));
  RETURN_IF_ERROR(ReadInt(root, "num_attention_heads", c.q_heads));
  c.kv_heads = c.q_heads;
  RETURN_IF_ERROR(ReadInt(root, "num_key_value_heads", c.kv_heads));
  c.head_dim = c.q_heads > 0 ? c.hidden / c.q_heads : 0;
  RETURN_IF_ERROR(ReadInt(root, "head_dim", c.head_dim));
  RETURN_IF_ERROR(ReadInt(root, "intermediate_size", c.ffn));
  RETURN_IF_ERROR(ReadInt(root, "vocab_size", c.vocab));
  RETURN_IF_ERROR(ReadInt(root, "max_position_embeddings", c.max_positions));
  double eps = 1e-6;
  RETURN_IF_ERROR(ReadDouble(root, "rms_norm_eps", eps));
  c.rms_eps = static_cast<float>(eps);
  c.rope.original_max_positions = c.max_positions;
  RETURN_IF_ERROR(ReadRope(root, c.rope));
  RETURN_IF_ERROR(ReadBool(root, "tie_word_embeddings", c.tied_head));
  RETURN_IF_ERROR(ReadTokenIds(root, c));
  RETURN_IF_ERROR(c.Validate());
  return c;
}

absl::StatusOr<ModelConfig> NamedGeometry(absl::string_view name) {
  if (name == "smollm2-135m") return SmolLm2();
  if (name == "qwen3-4b") return Qwen3_4b();
  if (name == "tiny-llama") return Tiny(name, Architecture::kLlama);
  if (name == "tiny-qwen2") return Tiny(name, Architecture::kQwen2);
  if (name == "tiny-qwen3") return Tiny(name, Architecture::kQwen3);
  return absl::NotFoundError(
      absl::StrCat("geometry \"", name,
                   "\" is unknown; want one of smollm2-135m, qwen3-4b, tiny-llama, tiny-qwen2, "
                   "tiny-qwen3 (no hybrid models)"));
}

}  // namespace coppice
