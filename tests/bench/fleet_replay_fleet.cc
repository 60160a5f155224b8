#include "tests/bench/fleet_replay_fleet.h"

#include <cstdlib>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "httplib.h"
#include "kernels/base/check.h"
#include "kernels/model/model_config.h"

namespace coppice::bench {
namespace {

constexpr char kNamePrefix[] = "replica-";
constexpr int64_t kContext = 128 << 10, kBlockTokens = 16;

void WriteModel(const TempDirectory& directory) {
  const std::string json =
      absl::StrCat(R"({"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16,)",
                   R"("num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16,)",
                   R"("intermediate_size": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,)",
                   R"("bos_token_id": 1, "eos_token_id": 2, "vocab_size": )", ReplayFleet::kVocab,
                   R"(, "max_position_embeddings": )", kContext, "}");
  const absl::StatusOr<ModelConfig> config = ParseHfConfig(json);
  CHECK(config.ok()) << config.status().message();
  std::vector<TestTensor> tensors = HfTestTensors(*config);
  for (TestTensor& tensor : tensors) tensor.data.assign(tensor.data.size(), '\0');
  directory.Write("config.json", json);
  directory.Write("model.safetensors", SafetensorsBytes(tensors));
}

std::unique_ptr<v1::Generation::Stub> Connect(int port) {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return v1::Generation::NewStub(grpc::CreateCustomChannel(
      absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials(), args));
}

int64_t ValueOf(const std::string& metrics, const std::string& series) {
  const size_t at = metrics.find("\n" + series + " ");
  CHECK(at != std::string::npos) << series;
  return static_cast<int64_t>(std::atof(metrics.c_str() + at + series.size() + 2));
}

}  // namespace

void TokenCounts::Add(const v1::Usage& usage) {
  prompt += usage.prompt_tokens();
  cached += usage.cached_device_tokens();
  joined += usage.joined_tokens();
  computed += usage.computed_tokens();
  completion += usage.completion_tokens();
}

void TokenCounts::Add(const TokenCounts& other) {
  prompt += other.prompt;
  cached += other.cached;
  joined += other.joined;
  computed += other.computed;
  completion += other.completion;
}

std::string TokenCounts::ToString() const {
  return absl::StrCat("prompt=", prompt, " cached=", cached, " joined=", joined,
                      " computed=", computed, " completion=", completion);
}

ReplayFleet::ReplayFleet(const std::string& coppiced, int64_t replicas, int64_t cache_tokens)
    : coppiced_(coppiced) {
  WriteModel(model_);
  for (int64_t r = 0; r < replicas; ++r) {
    replicas_.push_back(std::make_unique<DaemonProcess>(
        coppiced, std::vector<std::string>{
                      "--model=" + model_.path(), "--port=0", "--http_port=0", "--threads=1",
                      "--max_queued_requests=65536", absl::StrCat("--block_tokens=", kBlockTokens),
                      absl::StrCat("--kv_blocks=", cache_tokens / kBlockTokens)}));
  }
  for (const auto& daemon : replicas_) {
    CHECK(daemon->AwaitReady()) << daemon->log();
    replica_stubs_.push_back(Connect(daemon->grpc_port()));
  }
}

void ReplayFleet::StartRouter() {
  std::vector<std::string> members;
  for (int64_t r = 0; r < size(); ++r) {
    members.push_back(absl::StrCat(kNamePrefix, r, "=127.0.0.1:", replicas_[r]->grpc_port()));
  }
  // A busy machine is no reason to eject.
  router_ = std::make_unique<DaemonProcess>(
      coppiced_, std::vector<std::string>{"--role=router", "--port=0", "--http_port=0",
                                          "--health_timeout_ms=60000", "--first_byte_timeout_s=0",
                                          "--replicas=" + absl::StrJoin(members, ",")});
  CHECK(router_->AwaitReady()) << router_->log();
  // Ready means that it listens; on a busy machine its replicas join later.
  const std::vector<std::string> parts = absl::StrSplit(router_->lines_read(), " replica_joined ");
  for (auto joined = static_cast<int64_t>(parts.size()) - 1; joined < size(); ++joined) {
    CHECK(!router_->AwaitLine(" replica_joined ").empty()) << router_->log();
  }
  router_stub_ = Connect(router_->grpc_port());
}

int64_t ReplayFleet::IndexOf(const std::string& name) const {
  absl::string_view number = name;
  int64_t index = -1;
  const bool known = absl::ConsumePrefix(&number, kNamePrefix) &&
                     absl::SimpleAtoi(number, &index) && index >= 0 && index < size();
  return known ? index : -1;
}

TokenCounts ReplayFleet::Metrics(int64_t r) const {
  const auto response = httplib::Client("127.0.0.1", replicas_[r]->http_port()).Get("/metrics");
  CHECK(response && response->status == 200);
  const std::string& body = response->body;
  return {.prompt = ValueOf(body, "coppice_prompt_tokens_total"),
          .cached = ValueOf(body, R"(coppice_prompt_tokens_hit_total{tier="device"})"),
          .joined = ValueOf(body, "coppice_prompt_tokens_joined_total"),
          .computed = ValueOf(body, "coppice_prompt_tokens_computed_total"),
          .completion = ValueOf(body, "coppice_generation_tokens_total")};
}

}  // namespace coppice::bench
