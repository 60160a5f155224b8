#include "trainer/hf_config.h"

#include <nlohmann/json.hpp>

namespace coppice {
namespace {

// Values of transformers' model_type and architectures.
struct HfNames {
  const char* model_type;
  const char* class_name;
};

HfNames NamesOf(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      break;
    case Architecture::kQwen2:
      return {"qwen2", "Qwen2ForCausalLM"};
    case Architecture::kQwen3:
      return {"qwen3", "Qwen3ForCausalLM"};
  }
  return {"llama", "LlamaForCausalLM"};
}

nlohmann::ordered_json RopeScaling(const RopeConfig& rope) {
  switch (rope.scaling) {
    case RopeConfig::Scaling::kNone:
      break;
    case RopeConfig::Scaling::kLinear:
      return {{"rope_type", "linear"}, {"factor", rope.factor}};
    case RopeConfig::Scaling::kLlama3:
      return {{"rope_type", "llama3"},
              {"factor", rope.factor},
              {"low_freq_factor", rope.low_freq_factor},
              {"high_freq_factor", rope.high_freq_factor},
              {"original_max_position_embeddings", rope.original_max_positions}};
  }
  return nullptr;
}

}  // namespace

std::string HfConfigJson(const ModelConfig& config, DType compute_dtype) {
  const HfNames names = NamesOf(config.architecture);
  nlohmann::ordered_json root = {{"architectures", {names.class_name}},
                                 {"model_type", names.model_type},
                                 {"hidden_act", "silu"},
                                 {"hidden_size", config.hidden},
                                 {"intermediate_size", config.ffn},
                                 {"num_hidden_layers", config.num_layers},
                                 {"num_attention_heads", config.q_heads},
                                 {"num_key_value_heads", config.kv_heads},
                                 {"head_dim", config.head_dim},
                                 {"vocab_size", config.vocab},
                                 {"max_position_embeddings", config.max_positions},
                                 {"rms_norm_eps", config.rms_eps},
                                 {"rope_theta", config.rope.theta},
                                 {"rope_scaling", RopeScaling(config.rope)},
                                 {"tie_word_embeddings", config.tied_head},
                                 {"torch_dtype", "float32"}};
  if (compute_dtype != DType::kF32) root[kComputeTypeField] = Name(compute_dtype);
  if (config.bos_token >= 0) root["bos_token_id"] = config.bos_token;
  if (!config.eos_tokens.empty()) root["eos_token_id"] = config.eos_tokens;
  return root.dump(2) + "\n";
}

}  // namespace coppice
