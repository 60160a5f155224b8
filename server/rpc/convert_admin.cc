#include "kernels/model/parameters.h"
#include "server/rpc/convert.h"
#include "server/rpc/field_check.h"

namespace coppice {
namespace {

const char* ArchitectureName(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      return "llama";
    case Architecture::kQwen2:
      return "qwen2";
    case Architecture::kQwen3:
      return "qwen3";
  }
  return "";
}

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

absl::StatusOr<RunningRequests> FromProto(v1::RunningRequests running, RunningRequests fallback) {
  switch (running) {
    case v1::RUNNING_REQUESTS_UNSPECIFIED:
      return fallback;
    case v1::RUNNING_REQUESTS_DRAIN:
      return RunningRequests::kDrain;
    case v1::RUNNING_REQUESTS_RETRACT:
      return RunningRequests::kRetract;
    case v1::RUNNING_REQUESTS_KEEP:
      return RunningRequests::kKeep;
    default:
      return InvalidField("running", "a RunningRequests", static_cast<int>(running));
  }
}

v1::CacheStats ToProto(const CacheStats& stats) {
  v1::CacheStats proto;
  proto.set_total_blocks(stats.total_blocks);
  proto.set_free_blocks(stats.free_blocks);
  proto.set_leased_blocks(stats.leased_blocks);
  proto.set_cached_only_blocks(stats.cached_only_blocks);
  proto.set_num_nodes(stats.num_nodes);
  proto.set_num_namespaces(stats.num_namespaces);
  proto.set_evicted_blocks(stats.evicted_blocks);
  proto.set_published_blocks(stats.published_blocks);
  proto.set_queried_tokens(stats.queried_tokens);
  proto.set_hit_tokens(stats.hit_tokens);
  return proto;
}

v1::ModelInfo ToProto(const ModelConfig& config, const Tokenizer* tokenizer,
                      const std::string& chat_template) {
  v1::ModelInfo proto;
  proto.set_name(config.name);
  proto.set_description(config.ToString());
  proto.set_architecture(ArchitectureName(config.architecture));
  proto.set_num_parameters(NumParameters(config));
  proto.set_num_layers(config.num_layers);
  proto.set_hidden(config.hidden);
  proto.set_q_heads(config.q_heads);
  proto.set_kv_heads(config.kv_heads);
  proto.set_head_dim(config.head_dim);
  proto.set_ffn(config.ffn);
  proto.set_vocab_size(config.vocab);
  proto.set_max_positions(config.max_positions);
  proto.set_has_tokenizer(tokenizer != nullptr);
  proto.set_chat_template(chat_template);
  if (config.bos_token >= 0) proto.set_bos_token_id(config.bos_token);
  proto.mutable_eos_token_ids()->Add(config.eos_tokens.begin(), config.eos_tokens.end());
  if (tokenizer == nullptr) return proto;
  if (tokenizer->bos_token() >= 0) {
    proto.set_bos_token(tokenizer->Decode({tokenizer->bos_token()}, /*skip_special=*/false));
  }
  if (tokenizer->eos_token() >= 0) {
    proto.set_eos_token(tokenizer->Decode({tokenizer->eos_token()}, /*skip_special=*/false));
  }
  return proto;
}

}  // namespace coppice
