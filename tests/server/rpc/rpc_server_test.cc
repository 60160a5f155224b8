// The services over real sockets, in front of a fake engine that the test plays.
#include "server/rpc/rpc_server.h"

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "coppice/v1/admin.grpc.pb.h"
#include "coppice/v1/cache.grpc.pb.h"
#include "coppice/v1/generation.grpc.pb.h"
#include "coppice/v1/training.grpc.pb.h"
#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "gtest/gtest.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/fake_engine.h"

namespace coppice {
namespace {

using grpc::StatusCode;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class RpcServerTest : public ::testing::Test {
 protected:
  RpcServerTest() {
    model_.config = *NamedGeometry("tiny-llama");
    model_.tokenizer = std::make_unique<ByteTokenizer>();
    model_.chat_template = "{{ messages }}";
  }

  void Start(bool trust_tenant_header = false, std::string checkpoint_dir = "") {
    RpcContext context{
        .engine = engine_, .model = model_, .clock = clock_, .readiness = readiness_};
    context.engine_options.max_context = 64;
    context.engine_options.max_group_size = 8;
    context.max_message_bytes = 1 << 20;
    context.stream_capacity = 4;
    context.trust_tenant_header = trust_tenant_header;
    context.checkpoint_dir = std::move(checkpoint_dir);
    context.version = "1.2.3";
    context.memory_plan = {{"weights", 1000}};
    auto server = RpcServer::Start({}, std::move(context));
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->port()),
                                   grpc::InsecureChannelCredentials());
    generation_ = v1::Generation::NewStub(channel_);
    training_ = v1::Training::NewStub(channel_);
    cache_ = v1::Cache::NewStub(channel_);
    admin_ = v1::Admin::NewStub(channel_);
  }

  static v1::GenerateRequest Request() {
    v1::GenerateRequest request;
    for (const int id : {1, 2, 3}) request.mutable_prompt()->mutable_tokens()->add_ids(id);
    request.mutable_sampling()->set_max_tokens(8);
    return request;
  }

  static TokenChunk Chunk(int32_t token) {
    TokenChunk chunk;
    chunk.token_ids = {token};
    chunk.policy_version = PolicyVersion{7};
    return chunk;
  }

  FakeEngine engine_;
  Model model_;
  SteadyClock clock_;
  Readiness readiness_;
  std::unique_ptr<RpcServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Generation::Stub> generation_;
  std::unique_ptr<v1::Training::Stub> training_;
  std::unique_ptr<v1::Cache::Stub> cache_;
  std::unique_ptr<v1::Admin::Stub> admin_;
};

TEST_F(RpcServerTest, StreamsAGroup) {
  Start();
  grpc::ClientContext context;
  auto reader = generation_->Generate(&context, Request());
  auto call = engine_.TakeSubmitted();
  EXPECT_THAT(call.request.prompt, ElementsAre(1, 2, 3));
  EXPECT_EQ(call.request.deadline, std::nullopt);

  call.sink->OnStarted(42, Usage(), PolicyVersion{7});
  for (int32_t token = 0; token < 3; ++token) call.sink->OnChunk(Chunk(token));
  call.sink->OnSampleFinished({.sample = 0, .reason = FinishReason::kLength, .num_tokens = 3});
  call.sink->OnDone(absl::OkStatus(), Usage(), "r", PolicyVersion{7});

  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.started().seed(), 42u);
  for (int32_t token = 0; token < 3; ++token) {
    ASSERT_TRUE(reader->Read(&event));
    EXPECT_THAT(event.chunk().token_ids(), ElementsAre(token));
    EXPECT_EQ(event.chunk().policy_version(), 7u);
  }
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.finished().reason(), v1::FINISH_REASON_LENGTH);
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(event.group().rollout_id(), "r");
  EXPECT_FALSE(reader->Read(&event));
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(RpcServerTest, CancelReachesTheEngine) {
  Start();
  grpc::ClientContext context;
  auto reader = generation_->Generate(&context, Request());
  auto call = engine_.TakeSubmitted();
  call.sink->OnStarted(42, Usage(), PolicyVersion{7});
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_FALSE(call.sink->Cancelled());

  context.TryCancel();
  engine_.AwaitWakes(0);

  EXPECT_TRUE(call.sink->Cancelled());
  call.sink->OnDone(absl::CancelledError("gone"), Usage(), "", PolicyVersion{7});
  EXPECT_EQ(reader->Finish().error_code(), StatusCode::CANCELLED);
}

TEST_F(RpcServerTest, DisconnectReachesTheEngine) {
  Start();
  auto context = std::make_unique<grpc::ClientContext>();
  auto reader = generation_->Generate(context.get(), Request());
  auto call = engine_.TakeSubmitted();
  reader.reset();
  context.reset();  // the last reference of an unfinished call closes its stream
  engine_.AwaitWakes(0);
  EXPECT_TRUE(call.sink->Cancelled());
  call.sink->OnDone(absl::CancelledError("gone"), Usage(), "", PolicyVersion{7});
}

TEST_F(RpcServerTest, DeadlinesReachTheEngine) {
  Start();
  grpc::ClientContext context;
  const absl::Duration before = clock_.Now();
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::hours(1));
  auto reader = generation_->Generate(&context, Request());
  auto call = engine_.TakeSubmitted();
  ASSERT_TRUE(call.request.deadline.has_value());
  EXPECT_GT(*call.request.deadline, before + absl::Minutes(59));
  EXPECT_LT(*call.request.deadline, clock_.Now() + absl::Hours(2));

  call.sink->OnDone(absl::DeadlineExceededError("late"), Usage(), "", PolicyVersion{7});

  EXPECT_EQ(reader->Finish().error_code(), StatusCode::DEADLINE_EXCEEDED);
}

TEST_F(RpcServerTest, SlowReaderFillsTheQueueAndRoomWakesTheEngine) {
  Start();
  grpc::ClientContext context;
  auto reader = generation_->Generate(&context, Request());
  auto call = engine_.TakeSubmitted();
  // Large events, so that the connection's own buffers are full soon.
  int sent = 0;
  while (call.sink->HasRoom() && sent < 10'000) {
    TokenChunk chunk = Chunk(1);
    chunk.text.assign(64 << 10, 'x');
    call.sink->OnChunk(std::move(chunk));
    ++sent;
  }
  ASSERT_FALSE(call.sink->HasRoom()) << "nothing holds back the engine";
  const int wakes = engine_.wakes();

  v1::GenerateEvent event;
  int received = 0;
  std::thread slow_reader([&] {
    while (reader->Read(&event)) ++received;
  });
  engine_.AwaitWakes(wakes);
  EXPECT_TRUE(call.sink->HasRoom());
  call.sink->OnDone(absl::OkStatus(), Usage(), "", PolicyVersion{7});
  slow_reader.join();

  EXPECT_EQ(received, sent + 1);
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(RpcServerTest, RefusalsAreAnsweredAtOnce) {
  Start();
  v1::GenerateEvent event;
  {
    grpc::ClientContext context;
    v1::GenerateRequest request = Request();
    request.set_priority(-5000);
    auto reader = generation_->Generate(&context, request);
    EXPECT_FALSE(reader->Read(&event));
    const grpc::Status status = reader->Finish();
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(
        status.error_message(),
        "generate refused: priority: want an integer in [-1000, 1000], got -5000; correct the "
        "request");
  }
  engine_.submit_status = absl::ResourceExhaustedError("queue full: want 1 place, got 0; retry");
  {
    grpc::ClientContext context;
    auto reader = generation_->Generate(&context, Request());
    EXPECT_EQ(reader->Finish().error_code(), StatusCode::RESOURCE_EXHAUSTED);
  }
  EXPECT_EQ(engine_.num_submitted(), 0u);
}

TEST_F(RpcServerTest, TenantComesFromTheTrustedHeaderOnly) {
  Start(/*trust_tenant_header=*/true);
  {
    grpc::ClientContext context;
    auto reader = generation_->Generate(&context, Request());
    const grpc::Status status = reader->Finish();
    EXPECT_EQ(status.error_code(), StatusCode::UNAUTHENTICATED);
    EXPECT_THAT(status.error_message(), HasSubstr("x-coppice-tenant"));
  }
  {
    grpc::ClientContext context;
    context.AddMetadata(kTenantHeader, "two/parts");
    auto reader = generation_->Generate(&context, Request());
    EXPECT_EQ(reader->Finish().error_code(), StatusCode::UNAUTHENTICATED);
  }
  grpc::ClientContext context;
  context.AddMetadata(kTenantHeader, "blue");
  v1::GenerateRequest request = Request();
  request.set_request_id("r1");
  auto reader = generation_->Generate(&context, request);
  auto call = engine_.TakeSubmitted();
  EXPECT_EQ(call.request.tenant_salt, "tenant:blue");
  EXPECT_EQ(call.request.request_id, "blue/r1");
  call.sink->OnDone(absl::OkStatus(), Usage(), "", PolicyVersion{7});

  grpc::ClientContext abort_context;
  abort_context.AddMetadata(kTenantHeader, "red");
  v1::AbortRequest abort;
  abort.set_request_id("r1");
  v1::AbortResponse aborted;
  EXPECT_TRUE(generation_->Abort(&abort_context, abort, &aborted).ok());
  EXPECT_EQ(engine_.aborted_request_id, "red/r1");
}

TEST_F(RpcServerTest, EveryCallOfATenantNeedsTheHeader) {
  Start(/*trust_tenant_header=*/true, "/checkpoints");
  const auto code = [](auto& stub, auto method, const auto& request, auto response) {
    grpc::ClientContext context;
    return ((*stub).*method)(&context, request, &response).error_code();
  };
  const StatusCode refused = StatusCode::UNAUTHENTICATED;
  using G = v1::Generation::Stub;
  EXPECT_EQ(code(generation_, &G::Score, v1::ScoreRequest(), v1::ScoreResponse()), refused);
  EXPECT_EQ(code(generation_, &G::Warm, v1::WarmRequest(), v1::WarmResponse()), refused);
  EXPECT_EQ(code(generation_, &G::Abort, v1::AbortRequest(), v1::AbortResponse()), refused);
  EXPECT_EQ(code(generation_, &G::Tokenize, v1::TokenizeRequest(), v1::TokenizeResponse()),
            refused);
  EXPECT_EQ(code(generation_, &G::Detokenize, v1::DetokenizeRequest(), v1::DetokenizeResponse()),
            refused);
  using T = v1::Training::Stub;
  EXPECT_EQ(code(training_, &T::TrainStep, v1::TrainStepRequest(), v1::TrainStepResponse()),
            refused);
  EXPECT_EQ(code(training_, &T::ForwardBackward, v1::ForwardBackwardRequest(),
                 v1::ForwardBackwardResponse()),
            refused);
  EXPECT_EQ(code(training_, &T::OptimStep, v1::OptimStepRequest(), v1::OptimStepResponse()),
            refused);
  v1::SaveCheckpointRequest save;
  save.set_name("a");
  EXPECT_EQ(code(training_, &T::SaveCheckpoint, save, v1::SaveCheckpointResponse()), refused);
  v1::LoadCheckpointRequest load;
  load.set_name("a");
  EXPECT_EQ(code(training_, &T::LoadCheckpoint, load, v1::LoadCheckpointResponse()), refused);
  EXPECT_EQ(code(training_, &T::GetPolicy, v1::GetPolicyRequest(), v1::GetPolicyResponse()),
            refused);
  using C = v1::Cache::Stub;
  EXPECT_EQ(code(cache_, &C::GetStats, v1::GetStatsRequest(), v1::GetStatsResponse()), refused);
  EXPECT_EQ(code(cache_, &C::Flush, v1::FlushRequest(), v1::FlushResponse()), refused);
  EXPECT_EQ(engine_.checkpoint_path, "");
  EXPECT_TRUE(engine_.steps.empty());
}

TEST_F(RpcServerTest, StepsCarryTheirTenant) {
  Start(/*trust_tenant_header=*/true);
  grpc::ClientContext context;
  context.AddMetadata(kTenantHeader, "blue");
  v1::OptimStepRequest step;
  step.set_step_id("s");
  step.mutable_optim()->set_learning_rate(0.5f);
  v1::OptimStepResponse response;
  ASSERT_TRUE(training_->OptimStep(&context, step, &response).ok());
  EXPECT_EQ(engine_.steps.at(0).step_id, "blue/s");
  EXPECT_EQ(engine_.steps.at(0).tenant_salt, "tenant:blue");
}

TEST_F(RpcServerTest, HeaderIsIgnoredUnlessTrusted) {
  Start();
  grpc::ClientContext context;
  context.AddMetadata(kTenantHeader, "blue");
  auto reader = generation_->Generate(&context, Request());
  auto call = engine_.TakeSubmitted();
  EXPECT_EQ(call.request.tenant_salt, "");
  call.sink->OnDone(absl::CancelledError("over"), Usage(), "", PolicyVersion{7});
}

TEST_F(RpcServerTest, TokenizesAndBack) {
  Start();
  v1::TokenizeRequest tokenize;
  tokenize.set_text("hi");
  v1::TokenizeResponse tokens;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(generation_->Tokenize(&context, tokenize, &tokens).ok());
  }
  EXPECT_THAT(tokens.token_ids(), ElementsAre(ByteTokenizer::kBos, 'h', 'i'));
  EXPECT_EQ(tokens.policy_version(), 7u);
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = tokens.token_ids();
  detokenize.set_skip_special(true);
  v1::DetokenizeResponse text;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(generation_->Detokenize(&context, detokenize, &text).ok());
  }
  EXPECT_EQ(text.text(), "hi");
  detokenize.add_token_ids(100'000);
  grpc::ClientContext context;
  EXPECT_EQ(generation_->Detokenize(&context, detokenize, &text).error_code(),
            StatusCode::INVALID_ARGUMENT);
}

TEST_F(RpcServerTest, AScoreKnowsWhenItsCallerIsGone) {
  Start();
  engine_.hold_scores = true;
  v1::ScoreRequest request;
  request.add_groups()->mutable_prompt()->add_ids(1);
  request.mutable_groups(0)->add_responses()->add_ids(2);
  grpc::ClientContext context;
  std::thread caller([&] {
    v1::ScoreResponse response;
    EXPECT_EQ(generation_->Score(&context, request, &response).error_code(), StatusCode::CANCELLED);
  });
  const FakeEngine::HeldScore score = engine_.TakeScore();
  EXPECT_FALSE(score.request.abandoned());
  context.TryCancel();
  caller.join();
  while (!score.request.abandoned()) std::this_thread::yield();  // the server hears it a bit later
  score.reply(absl::CancelledError("gone"));
}

TEST_F(RpcServerTest, ScoresWarmsAndTrains) {
  Start();
  v1::ScoreRequest score;
  score.add_groups()->mutable_prompt()->add_ids(1);
  score.mutable_groups(0)->add_responses()->add_ids(2);
  v1::ScoreResponse scored;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(generation_->Score(&context, score, &scored).ok());
  }
  EXPECT_THAT(scored.responses(0).logprobs(), ElementsAre(-1.0f));
  v1::WarmRequest warm;
  warm.mutable_prompt()->set_text("abc");
  v1::WarmResponse warmed;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(generation_->Warm(&context, warm, &warmed).ok());
  }
  EXPECT_EQ(warmed.usage().prompt_tokens(), 4);

  v1::OptimStepRequest step;
  step.set_step_id("s");
  step.mutable_optim()->set_learning_rate(0.5f);
  v1::OptimStepResponse stepped;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(training_->OptimStep(&context, step, &stepped).ok());
  }
  EXPECT_EQ(stepped.policy_version(), 8u);
  EXPECT_EQ(engine_.steps.at(0).optim.learning_rate, 0.5f);
  step.clear_step_id();
  grpc::ClientContext context;
  const grpc::Status refused = training_->OptimStep(&context, step, &stepped);
  EXPECT_THAT(refused.error_message(), HasSubstr("optimizer step refused: step_id"));
  EXPECT_EQ(engine_.steps.size(), 1u);
}

TEST_F(RpcServerTest, CheckpointsAreNamesBelowOneDirectory) {
  Start(false, "/checkpoints");
  v1::SaveCheckpointResponse saved;
  v1::SaveCheckpointRequest save;
  for (const char* name : {"", "..", "../etc", "a/b", ".hidden", "with space", "durable",
                           "durable.partial", "run-1.partial"}) {
    grpc::ClientContext context;
    save.set_name(name);
    EXPECT_EQ(training_->SaveCheckpoint(&context, save, &saved).error_code(),
              StatusCode::INVALID_ARGUMENT)
        << name;
  }
  EXPECT_EQ(engine_.checkpoint_path, "");
  save.set_name("run-1.step_20");
  {
    grpc::ClientContext context;
    ASSERT_TRUE(training_->SaveCheckpoint(&context, save, &saved).ok());
  }
  EXPECT_EQ(saved.path(), "/checkpoints/run-1.step_20");
  v1::LoadCheckpointRequest load;
  load.set_name("absent");
  v1::LoadCheckpointResponse loaded;
  grpc::ClientContext context;
  EXPECT_EQ(training_->LoadCheckpoint(&context, load, &loaded).error_code(), StatusCode::NOT_FOUND);
}

TEST_F(RpcServerTest, CheckpointsNeedADirectory) {
  Start();
  v1::SaveCheckpointRequest save;
  save.set_name("x");
  v1::SaveCheckpointResponse saved;
  grpc::ClientContext context;
  const grpc::Status status = training_->SaveCheckpoint(&context, save, &saved);
  EXPECT_EQ(status.error_code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("--checkpoint_dir"));
}

TEST_F(RpcServerTest, StatusCarriesEverythingAClientNeeds) {
  Start();
  v1::GetStatusResponse status;
  grpc::ClientContext context;
  ASSERT_TRUE(admin_->GetStatus(&context, {}, &status).ok());
  EXPECT_EQ(status.model().chat_template(), "{{ messages }}");
  EXPECT_EQ(status.model().bos_token(), "<s>");
  EXPECT_EQ(status.model().vocab_size(), model_.config.vocab);
  EXPECT_GT(status.model().num_parameters(), 0);
  EXPECT_EQ(status.limits().max_context(), 64);
  EXPECT_EQ(status.limits().max_message_bytes(), 1 << 20);
  EXPECT_EQ(status.version(), "1.2.3");
  EXPECT_EQ(status.memory(0).name(), "weights");
  EXPECT_EQ(status.state(), v1::SERVING_STATE_SERVING);
}

TEST_F(RpcServerTest, PauseResumeAndDrainMoveReadiness) {
  Start();
  readiness_.SetLoaded();
  std::vector<bool> heard;
  readiness_.SetListener([&heard](bool ready) { heard.push_back(ready); });
  v1::PauseRequest pause;
  v1::PauseResponse paused;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(admin_->Pause(&context, pause, &paused).ok());
  }
  EXPECT_EQ(paused.requests(), 2);
  EXPECT_EQ(engine_.paused_with, RunningRequests::kKeep);
  EXPECT_EQ(readiness_.NotReadyReason(), "paused");
  v1::ResumeResponse resumed;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(admin_->Resume(&context, {}, &resumed).ok());
  }
  EXPECT_EQ(readiness_.NotReadyReason(), "");
  v1::DrainResponse drained;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(admin_->Drain(&context, {}, &drained).ok());
  }
  EXPECT_EQ(readiness_.NotReadyReason(), "draining");
  EXPECT_THAT(heard, ElementsAre(true, false, true, false));
}

TEST_F(RpcServerTest, RefusedPauseAndResumeLeaveReadiness) {
  Start();
  readiness_.SetLoaded();
  const auto pause = [this] {
    grpc::ClientContext context;
    v1::PauseResponse paused;
    return admin_->Pause(&context, {}, &paused).error_code();
  };
  engine_.control_status = absl::ResourceExhaustedError("commands: want room, got none; retry");
  EXPECT_EQ(pause(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(readiness_.NotReadyReason(), "");
  engine_.control_status = absl::OkStatus();
  EXPECT_EQ(pause(), StatusCode::OK);
  engine_.control_status = absl::ResourceExhaustedError("commands: want room, got none; retry");
  grpc::ClientContext context;
  v1::ResumeResponse resumed;
  EXPECT_EQ(admin_->Resume(&context, {}, &resumed).error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(readiness_.NotReadyReason(), "paused");
}

TEST_F(RpcServerTest, FlushesAndCountsTheCache) {
  Start();
  v1::FlushResponse flushed;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(cache_->Flush(&context, {}, &flushed).ok());
  }
  EXPECT_EQ(flushed.blocks_freed(), 3);
  v1::GetStatsResponse stats;
  grpc::ClientContext context;
  ASSERT_TRUE(cache_->GetStats(&context, {}, &stats).ok());
  EXPECT_EQ(stats.block_tokens(), 16);
}

TEST_F(RpcServerTest, TakenPortIsAnError) {
  Start();
  RpcContext context{.engine = engine_, .model = model_, .clock = clock_, .readiness = readiness_};
  context.max_message_bytes = 1 << 20;
  const auto second = RpcServer::Start({.port = server_->port()}, std::move(context));
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("change --port"));
}

}  // namespace
}  // namespace coppice
