// The whole serving path over real sockets with a tiny random model: what a caller does to a
// running stream, and that nothing leaks.
#include <atomic>
#include <cmath>
#include <random>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/serving_stack.h"

namespace coppice {
namespace {

using grpc::StatusCode;
using ::testing::HasSubstr;

// A stack whose streams buffer so little that EndlessRequest() waits for its reader long before
// its end, however late the test's own threads run.
ServingStack::Options SmallBuffers() {
  ServingStack::Options options;
  options.engine.num_blocks = 512;
  options.engine.max_context = 1024;
  options.stream_capacity = 8;
  options.small_windows = true;
  return options;
}

v1::GenerateRequest EndlessRequest() {
  v1::GenerateRequest request = TestRequest(20, 800);
  request.set_n(4);
  return request;
}

void ExpectNothingHeld(ServingStack& stack) {
  const v1::GetStatusResponse status = stack.AwaitIdle();
  EXPECT_EQ(status.cache().leased_blocks(), 0);
  EXPECT_EQ(status.cache().free_blocks() + status.cache().cached_only_blocks(),
            status.cache().total_blocks());
}

TEST(ServingTest, StreamsSamplesThatDiffer) {
  ServingStack stack;
  v1::GenerateRequest request = TestRequest(20, 16);
  request.set_n(3);
  const Completion completion = Generate(stack, request);
  ASSERT_TRUE(completion.status.ok()) << completion.status.error_message();
  ASSERT_EQ(completion.tokens.size(), 3u);
  for (const auto& tokens : completion.tokens) EXPECT_EQ(tokens.size(), 16u);
  EXPECT_NE(completion.tokens[0], completion.tokens[1]);
  EXPECT_EQ(completion.reasons[2], v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(completion.usage.prompt_tokens(), 20);
  EXPECT_EQ(completion.usage.completion_tokens(), 48);
  EXPECT_EQ(completion.seed, 11u);
  EXPECT_EQ(Generate(stack, request).tokens, completion.tokens);
  ExpectNothingHeld(stack);
}

TEST(ServingTest, TextPromptsStopStringsAndText) {
  ServingStack stack;
  v1::GenerateRequest request = TestRequest(1, 40);
  request.mutable_prompt()->set_text("once upon");
  request.set_return_text(true);
  const Completion free_running = Generate(stack, request);
  ASSERT_TRUE(free_running.status.ok()) << free_running.status.error_message();
  // Some ASCII character of the answer, so that stopping at it is visible.
  const std::string& text = free_running.texts[0];
  const size_t at =
      text.find_first_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", 3);
  ASSERT_NE(at, std::string::npos) << text;
  request.mutable_sampling()->add_stop_strings(text.substr(at, 1));

  const Completion stopped = Generate(stack, request);

  EXPECT_EQ(stopped.reasons[0], v1::FINISH_REASON_STOP_STRING);
  EXPECT_LT(stopped.tokens[0].size(), 40u);
}

TEST(ServingTest, CancelMidStreamFreesEverything) {
  ServingStack stack(SmallBuffers());
  grpc::ClientContext context;
  auto reader = stack.generation->Generate(&context, EndlessRequest());
  v1::GenerateEvent event;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(reader->Read(&event));
  context.TryCancel();
  EXPECT_EQ(ReadAll(*reader).status.error_code(), StatusCode::CANCELLED);
  ExpectNothingHeld(stack);
  EXPECT_EQ(stack.metrics.requests_aborted.Value(), 1);
}

TEST(ServingTest, DisconnectMidStreamFreesEverything) {
  ServingStack stack(SmallBuffers());
  {
    grpc::ClientContext context;
    auto reader = stack.generation->Generate(&context, EndlessRequest());
    v1::GenerateEvent event;
    ASSERT_TRUE(reader->Read(&event));
  }  // neither read to the end nor finished
  ExpectNothingHeld(stack);
}

TEST(ServingTest, DeadlinesEndWaitingAndRunningRequests) {
  ServingStack stack(SmallBuffers());
  grpc::ClientContext pause_context;
  v1::PauseResponse paused;
  ASSERT_TRUE(stack.admin->Pause(&pause_context, {}, &paused).ok());
  {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(30));
    auto reader = stack.generation->Generate(&context, EndlessRequest());
    EXPECT_EQ(ReadAll(*reader).status.error_code(), StatusCode::DEADLINE_EXCEEDED);
  }
  ExpectNothingHeld(stack);
  grpc::ClientContext resume_context;
  v1::ResumeResponse resumed;
  ASSERT_TRUE(stack.admin->Resume(&resume_context, {}, &resumed).ok());
  EXPECT_TRUE(Generate(stack, TestRequest(20, 4)).status.ok());
}

TEST(ServingTest, SlowReaderPausesItselfOnly) {
  ServingStack stack(SmallBuffers());
  const v1::GenerateRequest large = EndlessRequest();
  grpc::ClientContext context;
  auto slow = stack.generation->Generate(&context, large);
  v1::GenerateEvent event;
  ASSERT_TRUE(slow->Read(&event));

  // Another caller is served meanwhile, for longer than the slow one's buffers could have lasted.
  const Completion other = Generate(stack, TestRequest(20, 700, 3));
  ASSERT_TRUE(other.status.ok()) << other.status.error_message();
  EXPECT_EQ(other.tokens[0].size(), 700u);
  EXPECT_LT(stack.metrics.generation_tokens.Value(), 700 + 4 * 500);

  Completion late;
  Add(event, late);
  while (slow->Read(&event)) Add(event, late);
  ASSERT_TRUE(slow->Finish().ok());
  EXPECT_EQ(late.tokens, Generate(stack, large).tokens) << "pausing changed the answer";
  ExpectNothingHeld(stack);
}

TEST(ServingTest, FullQueueIsRefusedAtOnce) {
  ServingStack::Options options;
  options.engine.max_queued_requests = 1;
  ServingStack stack(options);
  grpc::ClientContext pause_context;
  v1::PauseResponse paused;
  ASSERT_TRUE(stack.admin->Pause(&pause_context, {}, &paused).ok());
  grpc::ClientContext context;
  auto waiting = stack.generation->Generate(&context, TestRequest(20, 4));
  stack.AwaitStatus([](const auto& status) { return status.queued_requests() == 1; });

  const Completion refused = Generate(stack, TestRequest(20, 4));

  EXPECT_EQ(refused.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(stack.metrics.requests_rejected.Value(), 1);
  grpc::ClientContext resume_context;
  v1::ResumeResponse resumed;
  ASSERT_TRUE(stack.admin->Resume(&resume_context, {}, &resumed).ok());
  EXPECT_TRUE(ReadAll(*waiting).status.ok());
}

TEST(ServingTest, DrainingRefusesNewWorkAndFinishesOld) {
  ServingStack stack(SmallBuffers());
  grpc::ClientContext context;
  auto running = stack.generation->Generate(&context, EndlessRequest());
  v1::GenerateEvent event;
  ASSERT_TRUE(running->Read(&event));
  std::thread drain([&stack] {
    grpc::ClientContext drain_context;
    v1::DrainResponse drained;
    EXPECT_TRUE(stack.admin->Drain(&drain_context, {}, &drained).ok());
  });
  stack.AwaitStatus([](const auto& s) { return s.state() == v1::SERVING_STATE_DRAINING; });

  const Completion refused = Generate(stack, TestRequest(20, 4));

  EXPECT_EQ(refused.status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("draining"));
  EXPECT_EQ(stack.readiness.NotReadyReason(), "draining");
  const Completion rest = ReadAll(*running);
  EXPECT_TRUE(rest.status.ok()) << rest.status.error_message();
  EXPECT_EQ(rest.reasons[0], v1::FINISH_REASON_LENGTH);
  drain.join();
}

TEST(ServingTest, AbortByNameIsAnsweredAfterBlocksAreFree) {
  ServingStack stack(SmallBuffers());
  v1::GenerateRequest request = EndlessRequest();
  request.set_request_id("one");
  grpc::ClientContext context;
  auto reader = stack.generation->Generate(&context, request);
  v1::GenerateEvent event;
  ASSERT_TRUE(reader->Read(&event));
  v1::AbortRequest abort;
  abort.set_request_id("one");
  v1::AbortResponse aborted;
  grpc::ClientContext abort_context;
  ASSERT_TRUE(stack.generation->Abort(&abort_context, abort, &aborted).ok());
  EXPECT_EQ(aborted.aborted(), 1);
  EXPECT_EQ(stack.Status().cache().leased_blocks(), 0);
  ReadAll(*reader);
}

TEST(ServingTest, TenantsWithEqualPromptsShareNothing) {
  ServingStack::Options options;
  options.trust_tenant_header = true;
  ServingStack stack(options);
  const auto cached = [&stack](const char* tenant) {
    grpc::ClientContext context;
    context.AddMetadata(kTenantHeader, tenant);
    const Completion completion =
        ReadAll(*stack.generation->Generate(&context, TestRequest(64, 2)));
    EXPECT_TRUE(completion.status.ok()) << completion.status.error_message();
    return completion.usage.cached_device_tokens();
  };
  EXPECT_EQ(cached("blue"), 0);
  EXPECT_GT(cached("blue"), 0);
  EXPECT_EQ(cached("red"), 0);
}

TEST(ServingTest, ATenantCannotTrainTheRolloutOfAnother) {
  ServingStack::Options options;
  options.trust_tenant_header = true;
  ServingStack stack(options);
  v1::GenerateRequest request = TestRequest(20, 4);
  request.set_retain(true);
  grpc::ClientContext context;
  context.AddMetadata(kTenantHeader, "blue");
  const Completion completion = ReadAll(*stack.generation->Generate(&context, request));
  ASSERT_FALSE(completion.rollout_id.empty());
  v1::TrainStepRequest step;
  step.set_step_id("s");
  step.mutable_optim()->set_learning_rate(0.01f);
  v1::Group* group = step.add_groups();
  group->set_rollout_id(completion.rollout_id);
  group->add_samples()->set_rollout_sample(0);
  group->mutable_samples(0)->add_advantages(1);
  const auto train = [&](const char* tenant, v1::TrainStepResponse* response) {
    grpc::ClientContext step_context;
    step_context.AddMetadata(kTenantHeader, tenant);
    return stack.training->TrainStep(&step_context, step, response).error_code();
  };
  v1::TrainStepResponse response;
  EXPECT_EQ(train("red", &response), StatusCode::NOT_FOUND);
  EXPECT_EQ(stack.Status().policy_version(), 0u);
  EXPECT_EQ(train("blue", &response), StatusCode::OK);
  // Equal step ids of two tenants are two steps.
  EXPECT_EQ(train("red", &response), StatusCode::NOT_FOUND);
  EXPECT_FALSE(response.repeated_step());
  EXPECT_EQ(stack.Status().policy_version(), 1u);
}

// Each bad call is answered with its code, and the daemon afterwards is what it was before.
TEST(ServingTest, BadCallsChangeNothing) {
  ServingStack stack;
  const Completion before = Generate(stack, TestRequest(20, 8));
  const std::string policy_before = stack.Status().cache().ShortDebugString();
  const auto expect = [&stack](StatusCode code, v1::GenerateRequest request) {
    const Completion refused = Generate(stack, request);
    EXPECT_EQ(refused.status.error_code(), code) << refused.status.error_message();
    EXPECT_THAT(refused.status.error_message(), HasSubstr("want "));
  };
  v1::GenerateRequest empty = TestRequest(0, 8);
  expect(StatusCode::INVALID_ARGUMENT, empty);
  expect(StatusCode::INVALID_ARGUMENT, TestRequest(20, 0));
  expect(StatusCode::INVALID_ARGUMENT, TestRequest(256, 8));
  v1::GenerateRequest bad_token = TestRequest(20, 8);
  bad_token.mutable_prompt()->mutable_tokens()->add_ids(300);
  expect(StatusCode::INVALID_ARGUMENT, bad_token);
  v1::GenerateRequest no_samples = TestRequest(20, 8);
  no_samples.set_n(0);
  expect(StatusCode::INVALID_ARGUMENT, no_samples);
  for (const float temperature : {std::nanf(""), -1.0f}) {
    v1::GenerateRequest request = TestRequest(20, 8);
    request.mutable_sampling()->set_temperature(temperature);
    expect(StatusCode::INVALID_ARGUMENT, request);
  }
  EXPECT_EQ(stack.Status().cache().ShortDebugString(), policy_before);
  EXPECT_EQ(Generate(stack, TestRequest(20, 8)).tokens, before.tokens);
}

TEST(ServingTest, BadStepsChangeNothing) {
  ServingStack stack;
  const Completion before = Generate(stack, TestRequest(20, 8));
  v1::TrainStepRequest good;
  good.set_step_id("bad");  // a refused step leaves no record: the id can be used again
  good.mutable_optim()->set_learning_rate(0.01f);
  for (const int id : {1, 2, 3}) good.add_groups()->mutable_prompt()->add_ids(id);
  for (v1::Group& group : *good.mutable_groups()) {
    v1::Sample* sample = group.add_samples();
    for (const int id : {4, 5, 6}) sample->mutable_token_ids()->add_ids(id);
    sample->add_advantages(1);
  }
  const auto expect = [&](StatusCode code, auto spoil) {
    v1::TrainStepRequest request = good;
    spoil(request, *request.mutable_groups(1)->mutable_samples(0));
    grpc::ClientContext context;
    v1::TrainStepResponse response;
    const grpc::Status status = stack.training->TrainStep(&context, request, &response);
    EXPECT_EQ(status.error_code(), code) << status.error_message();
  };
  expect(StatusCode::INVALID_ARGUMENT, [](auto&, auto& sample) { sample.add_advantages(1); });
  expect(StatusCode::INVALID_ARGUMENT,
         [](auto&, auto& sample) { sample.set_advantages(0, std::nanf("")); });
  expect(StatusCode::INVALID_ARGUMENT,
         [](auto&, auto& sample) { sample.mutable_token_ids()->clear_ids(); });
  expect(StatusCode::INVALID_ARGUMENT,
         [](auto&, auto& sample) { sample.mutable_token_ids()->set_ids(0, 300); });
  expect(StatusCode::NOT_FOUND, [](auto& request, auto& sample) {
    request.mutable_groups(1)->set_rollout_id("no-such-rollout");
    sample.set_rollout_sample(0);
  });
  expect(StatusCode::FAILED_PRECONDITION,
         [](auto& request, auto&) { request.set_expected_policy_version(9); });
  expect(StatusCode::FAILED_PRECONDITION, [](auto& request, auto&) { request.set_durable(true); });

  const v1::GetStatusResponse status = stack.Status();
  EXPECT_EQ(status.policy_version(), 0u);
  EXPECT_FALSE(status.pending_gradients());
  EXPECT_EQ(Generate(stack, TestRequest(20, 8)).tokens, before.tokens);
  expect(StatusCode::OK, [](auto&, auto&) {});
  EXPECT_EQ(stack.Status().policy_version(), 1u);
}

// A caller that behaves at random: reads a few events, then reads on, cancels, hangs up or runs
// into its deadline.
void MisbehaveOnce(ServingStack& stack, uint64_t seed) {
  std::mt19937_64 random(seed);
  v1::GenerateRequest request =
      TestRequest(1 + static_cast<int>(random() % 60), 1 + static_cast<int>(random() % 40),
                  static_cast<int>(random() % 3));
  request.set_n(1 + static_cast<int>(random() % 3));
  grpc::ClientContext context;
  const int choice = static_cast<int>(random() % 4);
  if (choice == 0) {
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::microseconds(random() % 10'000));
  }
  auto reader = stack.generation->Generate(&context, request);
  v1::GenerateEvent event;
  for (int reads = static_cast<int>(random() % 20); reads > 0 && reader->Read(&event); --reads) {
  }
  if (choice == 1) context.TryCancel();
  if (choice == 2) return;
  ReadAll(*reader);
}

TEST(ServingTest, NoBlockLeaksAfterAThousandBadCallers) {
  constexpr uint64_t kSeed = 20261121;
  SCOPED_TRACE(kSeed);
  ServingStack::Options options;
  options.engine.num_blocks = 64;  // tight: retraction and eviction take part
  options.engine.max_context = 128;
  options.stream_capacity = 4;
  ServingStack stack(options);
  std::atomic<int> next{0};
  std::vector<std::thread> callers;
  for (int t = 0; t < 8; ++t) {
    callers.emplace_back([&] {
      for (int i = next++; i < 1000; i = next++) MisbehaveOnce(stack, kSeed + i);
    });
  }
  for (std::thread& caller : callers) caller.join();
  ExpectNothingHeld(stack);
  EXPECT_TRUE(Generate(stack, TestRequest(20, 4)).status.ok());
}

}  // namespace
}  // namespace coppice
