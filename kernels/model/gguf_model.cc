#include "kernels/model/gguf_model.h"

#include <cmath>
#include <numbers>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

constexpr absl::string_view kRopeFactors = "rope_freqs.weight";

absl::Status ReadArchitecture(const GgufFile& file, std::string& name, ModelConfig& config) {
  RETURN_IF_ERROR(file.Read("general.architecture", name));
  if (name == "llama") {
    config.architecture = Architecture::kLlama;
  } else if (name == "qwen2") {
    config.architecture = Architecture::kQwen2;
    config.qkv_bias = true;
  } else if (name == "qwen3") {
    config.architecture = Architecture::kQwen3;
    config.qk_norm = true;
  } else {
    return absl::UnimplementedError(absl::StrCat("model architecture \"", name,
                                                 "\" (general.architecture): want one of llama, "
                                                 "qwen2, qwen3"));
  }
  return absl::OkStatus();
}

// What dividing rotary frequency `i` by the llama3 rule amounts to; transformers'
// modeling_rope_utils states the rule.
double Llama3Factor(const RopeConfig& rope, int64_t head_dim, int64_t i) {
  const double wavelength = 2 * std::numbers::pi * std::pow(rope.theta, 2.0 * i / head_dim);
  const double original = static_cast<double>(rope.original_max_positions);
  if (wavelength < original / rope.high_freq_factor) return 1.0;
  if (wavelength > original / rope.low_freq_factor) return rope.factor;
  const double smooth = (original / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return 1.0 / ((1 - smooth) / rope.factor + smooth);
}

// Converters store llama3 scaling as a tensor of divisors, not as its parameters. All published
// models use low 1, high 4 and 8192 positions; the largest divisor is the factor. The tensor must
// then be reproduced, else the scaling is another one.
absl::Status RecoverLlama3(const StoredTensor& tensor, const ModelConfig& config,
                           RopeConfig& rope) {
  std::vector<float> factors(config.head_dim / 2);
  bool same = tensor.shape == std::vector<int64_t>{config.head_dim / 2};
  if (same) {
    RETURN_IF_ERROR(tensor.ReadRows(0, config.head_dim / 2, factors.data()));
    rope.scaling = RopeConfig::Scaling::kLlama3;
    rope.low_freq_factor = 1;
    rope.high_freq_factor = 4;
    rope.original_max_positions = 8192;
    rope.factor = factors.back();
  }
  for (int64_t i = 0; same && i < config.head_dim / 2; ++i) {
    const double want = Llama3Factor(rope, config.head_dim, i);
    same = std::abs(factors[i] - want) <= 1e-4 * want;
  }
  if (same) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(
      kRopeFactors, ": want llama3 scaling with low 1, high 4 and 8192 original positions"));
}

absl::Status ReadRope(const GgufFile& file, const std::string& arch, ModelConfig& config) {
  RopeConfig& rope = config.rope;
  int64_t rotated = config.head_dim;
  std::string scaling = "none";
  RETURN_IF_ERROR(file.Read(arch + ".rope.freq_base", rope.theta));
  RETURN_IF_ERROR(file.Read(arch + ".rope.dimension_count", rotated));
  RETURN_IF_ERROR(file.Read(arch + ".rope.scaling.type", scaling));
  RETURN_IF_ERROR(file.Read(arch + ".rope.scaling.factor", rope.factor));
  if (rotated != config.head_dim) {
    return absl::UnimplementedError(
        absl::StrCat("rope.dimension_count: want head_dim=", config.head_dim, ", got ", rotated));
  }
  if (scaling == "linear") {
    rope.scaling = RopeConfig::Scaling::kLinear;
  } else if (scaling != "none") {
    return absl::UnimplementedError(
        absl::StrCat("rope.scaling.type ", scaling, ": want one of none, linear"));
  }
  const StoredTensor* factors = file.FindTensor(kRopeFactors);
  if (factors == nullptr) return absl::OkStatus();
  return RecoverLlama3(*factors, config, rope);
}

absl::Status ReadTokenIds(const GgufFile& file, ModelConfig& config) {
  int64_t bos = -1, eos = -1, eot = -1;
  RETURN_IF_ERROR(file.Read("tokenizer.ggml.bos_token_id", bos));
  RETURN_IF_ERROR(file.Read("tokenizer.ggml.eos_token_id", eos));
  RETURN_IF_ERROR(file.Read("tokenizer.ggml.eot_token_id", eot));
  if (bos >= 0 && bos < config.vocab) config.bos_token = static_cast<int32_t>(bos);
  for (const int64_t id : {eos, eot}) {
    if (id >= config.vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("gguf eos token: want an id below ", config.vocab, ", got ", id));
    }
    const bool known = !config.eos_tokens.empty() && config.eos_tokens[0] == id;
    if (id >= 0 && !known) config.eos_tokens.push_back(static_cast<int32_t>(id));
  }
  return absl::OkStatus();
}

// "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; empty if the name is not one
// of ours.
std::string ToHfName(absl::string_view name) {
  if (name == "token_embd.weight") return "model.embed_tokens.weight";
  if (name == "output_norm.weight") return "model.norm.weight";
  if (name == "output.weight") return "lm_head.weight";
  if (!absl::ConsumePrefix(&name, "blk.")) return "";
  const size_t dot = name.find('.');
  const size_t last = name.rfind('.');
  int64_t layer;
  if (dot == last || dot == absl::string_view::npos ||
      !absl::SimpleAtoi(name.substr(0, dot), &layer)) {
    return "";
  }
  static constexpr std::pair<absl::string_view, absl::string_view> kParts[] = {
      {"attn_norm", "input_layernorm"},    {"ffn_norm", "post_attention_layernorm"},
      {"attn_q", "self_attn.q_proj"},      {"attn_k", "self_attn.k_proj"},
      {"attn_v", "self_attn.v_proj"},      {"attn_output", "self_attn.o_proj"},
      {"attn_q_norm", "self_attn.q_norm"}, {"attn_k_norm", "self_attn.k_norm"},
      {"ffn_gate", "mlp.gate_proj"},       {"ffn_up", "mlp.up_proj"},
      {"ffn_down", "mlp.down_proj"},
  };
  const absl::string_view part = name.substr(dot + 1, last - dot - 1);
  for (const auto& [gguf, hf] : kParts) {
    if (part == gguf) return absl::StrCat("model.layers.", layer, ".", hf, name.substr(last));
  }
  return "";
}

class GgufTensorSource final : public TensorSource {
 public:
  explicit GgufTensorSource(int64_t head_dim) : head_dim_(head_dim) {}

  absl::Status Add(const GgufFile& file, const std::string& gguf_name, bool is_llama) {
    if (gguf_name == kRopeFactors) return absl::OkStatus();
    const std::string name = ToHfName(gguf_name);
    if (name.empty()) {
      return absl::UnimplementedError(
          absl::StrCat("gguf tensor ", gguf_name, " has no place in llama, qwen2 or qwen3"));
    }
    const bool is_q_or_k = absl::EndsWith(name, "self_attn.q_proj.weight") ||
                           absl::EndsWith(name, "self_attn.k_proj.weight");
    const StoredTensor* tensor = file.FindTensor(gguf_name);
    const bool interleaved = is_llama && is_q_or_k;
    if (interleaved && tensor->shape[0] % head_dim_ != 0) {
      return absl::InvalidArgumentError(absl::StrCat("gguf tensor ", gguf_name,
                                                     ": want a multiple of ", head_dim_,
                                                     " rows, got ", tensor->shape[0]));
    }
    names_.push_back(name);
    tensors_[name] = {tensor, interleaved};
    return absl::OkStatus();
  }

  std::vector<std::string> Names() const override { return names_; }

  absl::StatusOr<std::vector<int64_t>> Shape(absl::string_view name) const override {
    ASSIGN_OR_RETURN(const Entry* entry, Find(name));
    return entry->tensor->shape;
  }

  absl::StatusOr<StoredType> Type(absl::string_view name) const override {
    ASSIGN_OR_RETURN(const Entry* entry, Find(name));
    return entry->tensor->type;
  }

  absl::Status ReadRows(absl::string_view name, int64_t row_begin, int64_t row_end,
                        float* out) const override {
    ASSIGN_OR_RETURN(const Entry* entry, Find(name));
    const StoredTensor& tensor = *entry->tensor;
    if (!entry->interleaved) return tensor.ReadRows(row_begin, row_end, out);
    const int64_t half = head_dim_ / 2;
    const int64_t row = tensor.shape.size() < 2 ? 1 : tensor.shape.back();
    for (int64_t r = row_begin; r < row_end; ++r, out += row) {
      const int64_t head = r / head_dim_, in_head = r % head_dim_;
      const int64_t stored = head * head_dim_ + 2 * (in_head % half) + in_head / half;
      RETURN_IF_ERROR(tensor.ReadRows(stored, stored + 1, out));
    }
    return absl::OkStatus();
  }

 private:
  struct Entry {
    const StoredTensor* tensor = nullptr;
    bool interleaved = false;
  };

  absl::StatusOr<const Entry*> Find(absl::string_view name) const {
    const auto it = tensors_.find(name);
    if (it != tensors_.end()) return &it->second;
    return absl::NotFoundError(absl::StrCat("gguf has no tensor ", name));
  }

  int64_t head_dim_;
  std::vector<std::string> names_;
  absl::flat_hash_map<std::string, Entry> tensors_;
};

}  // namespace

absl::StatusOr<ModelConfig> ParseGgufConfig(const GgufFile& file) {
  ModelConfig c;
  std::string arch;
  RETURN_IF_ERROR(ReadArchitecture(file, arch, c));
  RETURN_IF_ERROR(file.Read("general.name", c.name));
  RETURN_IF_ERROR(file.Read(arch + ".block_count", c.num_layers));
  RETURN_IF_ERROR(file.Read(arch + ".embedding_length", c.hidden));
  RETURN_IF_ERROR(file.Read(arch + ".attention.head_count", c.q_heads));
  c.kv_heads = c.q_heads;
  RETURN_IF_ERROR(file.Read(arch + ".attention.head_count_kv", c.kv_heads));
  c.head_dim = c.q_heads > 0 ? c.hidden / c.q_heads : 0;
  RETURN_IF_ERROR(file.Read(arch + ".attention.key_length", c.head_dim));
  RETURN_IF_ERROR(file.Read(arch + ".feed_forward_length", c.ffn));
  RETURN_IF_ERROR(file.Read(arch + ".context_length", c.max_positions));
  double eps = 1e-5;
  RETURN_IF_ERROR(file.Read(arch + ".attention.layer_norm_rms_epsilon", eps));
  c.rms_eps = static_cast<float>(eps);
  const StoredTensor* embedding = file.FindTensor("token_embd.weight");
  if (embedding != nullptr) c.vocab = embedding->shape[0];
  c.tied_head = file.FindTensor("output.weight") == nullptr;
  RETURN_IF_ERROR(c.Validate());
  RETURN_IF_ERROR(ReadRope(file, arch, c));
  RETURN_IF_ERROR(ReadTokenIds(file, c));
  RETURN_IF_ERROR(c.Validate());
  return c;
}

absl::StatusOr<std::unique_ptr<TensorSource>> MakeGgufTensorSource(const GgufFile& file,
                                                                   const ModelConfig& config) {
  auto source = std::make_unique<GgufTensorSource>(config.head_dim);
  for (const std::string& name : file.tensor_names()) {
    RETURN_IF_ERROR(source->Add(file, name, config.architecture == Architecture::kLlama));
  }
  return source;
}

}  // namespace coppice
