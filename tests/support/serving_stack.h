// ServingStack: everything of coppiced but the process - a tiny random model, engine and its
// thread, RPC server on a free port - and clients for it. Text works through ByteTokenizer.
#pragma once

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coppice/v1/admin.grpc.pb.h"
#include "coppice/v1/cache.grpc.pb.h"
#include "coppice/v1/generation.grpc.pb.h"
#include "coppice/v1/training.grpc.pb.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "kernels/base/check.h"
#include "kernels/ops/ops.h"
#include "server/rpc/rpc_server.h"
#include "tests/support/byte_tokenizer.h"

namespace coppice {

class ServingStack {
 public:
  struct Options {
    EngineOptions engine{.num_blocks = 256, .max_context = 256, .seed = 1};
    int64_t stream_capacity = 256;
    bool trust_tenant_header = false;
    std::string checkpoint_dir;
    bool small_windows = false;  // the connection itself buffers a few kB only
  };

  ServingStack() : ServingStack(Options()) {}
  explicit ServingStack(Options options) {
    ops_ = *ops::CreateOps("cpu", 1);
    model_ = *RandomModel(*NamedGeometry("tiny-llama"), /*seed=*/1, *ops_);
    model_.tokenizer = std::make_unique<ByteTokenizer>();
    decoder_ = *Decoder::Create(model_.config, *ops_);
    auto engine = Engine::Create(options.engine, model_, *decoder_, metrics, clock_);
    CHECK_OK(engine.status());
    engine_ = *std::move(engine);
    engine_thread_ = std::thread([this] { CHECK_OK(engine_->Run()); });
    RpcContext context{
        .engine = *engine_, .model = model_, .clock = clock_, .readiness = readiness};
    context.engine_options = options.engine;
    context.max_message_bytes = 64 << 20;
    context.stream_capacity = options.stream_capacity;
    context.trust_tenant_header = options.trust_tenant_header;
    context.checkpoint_dir = options.checkpoint_dir;
    auto server = RpcServer::Start({}, std::move(context));
    CHECK_OK(server.status());
    server_ = *std::move(server);
    grpc::ChannelArguments args;
    if (options.small_windows) {
      args.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
      args.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 8192);
    }
    const auto channel = grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", server_->port()),
                                                   grpc::InsecureChannelCredentials(), args);
    generation = v1::Generation::NewStub(channel);
    training = v1::Training::NewStub(channel);
    cache = v1::Cache::NewStub(channel);
    admin = v1::Admin::NewStub(channel);
  }

  ~ServingStack() {
    engine_->Stop();
    engine_thread_.join();
    server_->Shutdown(absl::Seconds(1));
  }

  Engine& engine() { return *engine_; }

  v1::GetStatusResponse Status() {
    grpc::ClientContext context;
    v1::GetStatusResponse status;
    CHECK(admin->GetStatus(&context, {}, &status).ok());
    return status;
  }

  // Asks for the status until `done(status)`; each question costs the engine one turn.
  template <typename Done>
  v1::GetStatusResponse AwaitStatus(Done done) {
    v1::GetStatusResponse status = Status();
    while (!done(status)) status = Status();
    return status;
  }
  v1::GetStatusResponse AwaitIdle() {
    return AwaitStatus([](const v1::GetStatusResponse& status) {
      return status.running_requests() == 0 && status.queued_requests() == 0;
    });
  }

  Metrics metrics;
  Readiness readiness;
  std::unique_ptr<v1::Generation::Stub> generation;
  std::unique_ptr<v1::Training::Stub> training;
  std::unique_ptr<v1::Cache::Stub> cache;
  std::unique_ptr<v1::Admin::Stub> admin;

 private:
  std::unique_ptr<ops::Ops> ops_;
  Model model_;
  std::unique_ptr<Decoder> decoder_;
  SteadyClock clock_;
  std::unique_ptr<Engine> engine_;
  std::thread engine_thread_;
  std::unique_ptr<RpcServer> server_;
};

// What a Generate stream said.
struct Completion {
  grpc::Status status;
  uint64_t seed = 0;
  std::vector<std::vector<int32_t>> tokens;  // [sample]
  std::vector<v1::FinishReason> reasons;     // [sample]
  std::vector<std::string> texts;            // [sample]
  v1::Usage usage;
  std::string rollout_id;
  uint64_t policy_version = 0;
};

inline void Add(const v1::GenerateEvent& event, Completion& completion) {
  const auto grow = [&completion](int sample) {
    if (static_cast<int>(completion.tokens.size()) > sample) return;
    completion.tokens.resize(sample + 1);
    completion.texts.resize(sample + 1);
    completion.reasons.resize(sample + 1);
  };
  if (event.has_started()) completion.seed = event.started().seed();
  if (event.has_chunk()) {
    const v1::TokenChunk& chunk = event.chunk();
    grow(chunk.sample());
    std::vector<int32_t>& tokens = completion.tokens[chunk.sample()];
    tokens.insert(tokens.end(), chunk.token_ids().begin(), chunk.token_ids().end());
    completion.texts[chunk.sample()] += chunk.text();
    completion.policy_version = chunk.policy_version();
  }
  if (event.has_finished()) {
    grow(event.finished().sample());
    completion.reasons[event.finished().sample()] = event.finished().reason();
  }
  if (event.has_group()) {
    completion.usage = event.group().usage();
    completion.rollout_id = event.group().rollout_id();
  }
}

// Reads a stream to its end.
inline Completion ReadAll(grpc::ClientReader<v1::GenerateEvent>& reader) {
  Completion completion;
  v1::GenerateEvent event;
  while (reader.Read(&event)) Add(event, completion);
  completion.status = reader.Finish();
  return completion;
}

inline Completion Generate(ServingStack& stack, const v1::GenerateRequest& request) {
  grpc::ClientContext context;
  return ReadAll(*stack.generation->Generate(&context, request));
}

// `prompt_tokens` ids that start with `first`; greedy unless the caller changes it, end tokens
// ignored.
inline v1::GenerateRequest TestRequest(int prompt_tokens, int max_tokens, int first = 1) {
  v1::GenerateRequest request;
  for (int i = 0; i < prompt_tokens; ++i) {
    request.mutable_prompt()->mutable_tokens()->add_ids((first + 7 * i) % 250);
  }
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_seed(11);
  request.mutable_sampling()->set_ignore_eos(true);
  return request;
}

}  // namespace coppice
