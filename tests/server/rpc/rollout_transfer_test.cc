// Rollouts that move between daemons: a step on one that was put here does what it does where it
// was generated.
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/serving_stack.h"

namespace coppice {
namespace {

using grpc::StatusCode;
using ::testing::HasSubstr;

v1::GenerateRequest RetainedRequest() {
  v1::GenerateRequest request = TestRequest(20, 12);
  request.set_n(4);
  request.set_retain(true);
  request.mutable_sampling()->set_temperature(0.7f);
  return request;
}

// `rewards` decide the advantages; no reward is like another.
v1::TrainStepRequest StepOn(const std::string& rollout_id, const std::string& step_id) {
  v1::TrainStepRequest step;
  step.set_step_id(step_id);
  step.mutable_optim()->set_learning_rate(0.01f);
  step.mutable_loss()->set_temperature(0.7f);
  step.set_return_logprobs(true);
  v1::Group* group = step.add_groups();
  group->set_rollout_id(rollout_id);
  for (int i = 0; i < 4; ++i) {
    v1::Sample* sample = group->add_samples();
    sample->set_rollout_sample(i);
    sample->set_reward(0.25f * static_cast<float>(i * i));
  }
  return step;
}

// Calls with a tenant's header, if there is one.
class Caller {
 public:
  explicit Caller(ServingStack& stack, std::string tenant = "")
      : stack_(stack), tenant_(std::move(tenant)) {}

  std::string Retain(const v1::GenerateRequest& request = RetainedRequest()) {
    grpc::ClientContext context;
    Name(context);
    const Completion completion = ReadAll(*stack_.generation->Generate(&context, request));
    EXPECT_TRUE(completion.status.ok()) << completion.status.error_message();
    return completion.rollout_id;
  }
  grpc::Status Get(const std::string& id, v1::Rollout* rollout) {
    grpc::ClientContext context;
    Name(context);
    v1::GetRolloutRequest request;
    request.set_rollout_id(id);
    v1::GetRolloutResponse response;
    const grpc::Status status = stack_.training->GetRollout(&context, request, &response);
    EXPECT_EQ(response.policy_version(), status.ok() ? stack_.Status().policy_version() : 0);
    *rollout = response.rollout();
    return status;
  }
  grpc::Status Put(const std::string& id, const v1::Rollout& rollout) {
    grpc::ClientContext context;
    Name(context);
    v1::PutRolloutRequest request;
    request.set_rollout_id(id);
    *request.mutable_rollout() = rollout;
    v1::PutRolloutResponse response;
    return stack_.training->PutRollout(&context, request, &response);
  }
  grpc::Status Train(const v1::TrainStepRequest& step, v1::TrainStepResponse* response) {
    grpc::ClientContext context;
    Name(context);
    return stack_.training->TrainStep(&context, step, response);
  }
  // Of the first rollout's tokens, under the policy as it is now.
  std::vector<float> Score(const v1::Rollout& rollout) {
    grpc::ClientContext context;
    Name(context);
    v1::ScoreRequest request;
    v1::ScoreGroup* group = request.add_groups();
    *group->mutable_prompt() = rollout.prompt();
    for (const v1::RolloutSample& sample : rollout.samples()) {
      *group->add_responses()->mutable_ids() = sample.token_ids();
    }
    v1::ScoreResponse response;
    EXPECT_TRUE(stack_.generation->Score(&context, request, &response).ok());
    std::vector<float> logprobs;
    for (const v1::ScoredResponse& scored : response.responses()) {
      logprobs.insert(logprobs.end(), scored.logprobs().begin(), scored.logprobs().end());
    }
    return logprobs;
  }

 private:
  void Name(grpc::ClientContext& context) const {
    if (!tenant_.empty()) context.AddMetadata("x-coppice-tenant", tenant_);
  }

  ServingStack& stack_;
  const std::string tenant_;
};

v1::Rollout SmallRollout() {
  v1::Rollout rollout;
  rollout.mutable_prompt()->add_ids(5);
  v1::RolloutSample* sample = rollout.add_samples();
  for (const int id : {6, 7}) sample->add_token_ids(id);
  for (const float logprob : {-1.5f, -2.5f}) sample->add_sampler_logprobs(logprob);
  rollout.set_temperature(1);
  return rollout;
}

TEST(RolloutTransferTest, AStepOnAMovedRolloutIsTheStepAtItsHome) {
  ServingStack home, other;
  Caller at_home(home), elsewhere(other);
  const std::string id = at_home.Retain();
  v1::Rollout rollout, copy;
  ASSERT_TRUE(at_home.Get(id, &rollout).ok());
  ASSERT_EQ(rollout.samples_size(), 4);
  EXPECT_EQ(rollout.temperature(), 0.7f);
  EXPECT_EQ(rollout.prompt().ids_size(), 20);
  ASSERT_TRUE(elsewhere.Put("moved@home", rollout).ok());
  ASSERT_TRUE(elsewhere.Put("moved@home", rollout).ok()) << "a repeat changes nothing";
  ASSERT_TRUE(elsewhere.Get("moved@home", &copy).ok());
  EXPECT_EQ(copy.SerializeAsString(), rollout.SerializeAsString());
  EXPECT_EQ(other.Status().rollouts(), 1);

  // Twice: the second step is off-policy, so that the sampler's log-probs decide the ratio.
  for (const char* step_id : {"one", "two"}) {
    v1::TrainStepRequest step = StepOn(id, step_id);
    step.set_max_policy_lag(1);
    v1::TrainStepResponse want, got;
    ASSERT_TRUE(at_home.Train(step, &want).ok());
    step.mutable_groups(0)->set_rollout_id("moved@home");
    ASSERT_TRUE(elsewhere.Train(step, &got).ok());
    want.clear_phases();  // seconds
    got.clear_phases();
    EXPECT_GT(want.grad_norm(), 0);
    EXPECT_EQ(got.loss(), want.loss());
    EXPECT_EQ(got.grad_norm(), want.grad_norm());
    EXPECT_EQ(got.policy_version(), want.policy_version());
    using Metrics = std::map<std::string, double>;
    EXPECT_EQ(Metrics(got.metrics().begin(), got.metrics().end()),
              Metrics(want.metrics().begin(), want.metrics().end()));
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(got.samples(i).SerializeAsString(), want.samples(i).SerializeAsString());
    }
    EXPECT_EQ(elsewhere.Score(rollout), at_home.Score(rollout)) << "the weights differ";
  }
  v1::TrainStepResponse response;
  v1::TrainStepRequest late = StepOn("moved@home", "three");
  const grpc::Status stale = elsewhere.Train(late, &response);
  EXPECT_EQ(stale.error_code(), StatusCode::FAILED_PRECONDITION) << "its policy is two steps old";
  late.set_max_policy_lag(2);
  late.mutable_loss()->set_temperature(1);
  EXPECT_EQ(elsewhere.Train(late, &response).error_code(), StatusCode::INVALID_ARGUMENT);
}

TEST(RolloutTransferTest, OtherContentUnderAKeptIdIsRefused) {
  ServingStack stack;
  Caller caller(stack);
  ASSERT_TRUE(caller.Put("id", SmallRollout()).ok());
  v1::Rollout other = SmallRollout();
  other.mutable_samples(0)->set_sampler_logprobs(1, -2.25f);
  EXPECT_EQ(caller.Put("id", other).error_code(), StatusCode::ALREADY_EXISTS);
  v1::Rollout kept;
  ASSERT_TRUE(caller.Get("id", &kept).ok());
  EXPECT_EQ(kept.SerializeAsString(), SmallRollout().SerializeAsString());
}

TEST(RolloutTransferTest, ATenantSeesItsOwnRolloutsOnly) {
  ServingStack::Options options;
  options.trust_tenant_header = true;
  ServingStack stack(std::move(options));
  Caller a(stack, "a"), b(stack, "b"), nobody(stack);
  const std::string id = a.Retain();
  v1::Rollout rollout, none;
  ASSERT_TRUE(a.Get(id, &rollout).ok());
  EXPECT_EQ(b.Get(id, &none).error_code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(none.samples_size(), 0);
  EXPECT_EQ(nobody.Get(id, &none).error_code(), StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(nobody.Put("x", rollout).error_code(), StatusCode::UNAUTHENTICATED);
  // The same id is another rollout for another tenant: nobody can take it from its owner.
  ASSERT_TRUE(b.Put(id, SmallRollout()).ok());
  ASSERT_TRUE(a.Get(id, &none).ok());
  EXPECT_EQ(none.SerializeAsString(), rollout.SerializeAsString());
  v1::TrainStepResponse response;
  EXPECT_TRUE(a.Train(StepOn(id, "step"), &response).ok());
  EXPECT_EQ(b.Train(StepOn("unknown", "step"), &response).error_code(), StatusCode::NOT_FOUND);
}

TEST(RolloutTransferTest, TheOldestGoesFirstAndOwnIdsStayFree) {
  ServingStack::Options options;
  options.engine.max_rollouts = 2;
  ServingStack stack(std::move(options));
  Caller caller(stack);
  v1::Rollout rollout;
  for (const char* id : {"1", "2", "3"}) ASSERT_TRUE(caller.Put(id, SmallRollout()).ok());
  EXPECT_EQ(stack.Status().rollouts(), 2);
  EXPECT_EQ(caller.Get("1", &rollout).error_code(), StatusCode::NOT_FOUND);
  EXPECT_TRUE(caller.Get("3", &rollout).ok());

  // The id that the daemon would draw next.
  std::string next = caller.Retain();
  ASSERT_EQ(next.back(), '0');
  next.back() = '1';
  ASSERT_TRUE(caller.Put(next, SmallRollout()).ok());
  const std::string drawn = caller.Retain();
  EXPECT_NE(drawn, next);
  ASSERT_TRUE(caller.Get(drawn, &rollout).ok());
  EXPECT_EQ(rollout.samples_size(), 4);
  ASSERT_TRUE(caller.Get(next, &rollout).ok());
  EXPECT_EQ(rollout.SerializeAsString(), SmallRollout().SerializeAsString());
}

TEST(RolloutTransferTest, WhatNoDaemonGeneratedIsRefused) {
  ServingStack stack;
  Caller caller(stack);
  const auto expect_refused = [&](const std::string& field, auto change, std::string id = "id") {
    v1::Rollout rollout = SmallRollout();
    change(rollout);
    const grpc::Status status = caller.Put(id, rollout);
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << field;
    EXPECT_THAT(status.error_message(), HasSubstr("rollout refused: " + field + ": want "));
  };
  using R = v1::Rollout;
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::string sample = "rollout.samples[0].";
  expect_refused(
      "rollout_id", [](R&) {}, "");
  expect_refused(
      "rollout_id", [](R&) {}, "a b");
  expect_refused(
      "rollout_id", [](R&) {}, std::string(257, 'a'));
  expect_refused("rollout.prompt.size", [](R& r) { r.clear_prompt(); });
  expect_refused("rollout.prompt.size", [](R& r) {
    for (int i = 0; i < 256; ++i) r.mutable_prompt()->add_ids(1);
  });
  expect_refused("rollout.prompt[0]", [](R& r) { r.mutable_prompt()->set_ids(0, -1); });
  expect_refused("rollout.prompt[0]", [](R& r) { r.mutable_prompt()->set_ids(0, 1 << 30); });
  expect_refused("rollout.samples.size", [](R& r) { r.clear_samples(); });
  expect_refused("rollout.samples.size", [](R& r) {
    for (int i = 0; i < 256; ++i) r.add_samples();
  });
  expect_refused(sample + "token_ids[1]",
                 [](R& r) { r.mutable_samples(0)->set_token_ids(1, 1 << 30); });
  expect_refused(sample + "token_ids.size", [](R& r) {
    for (int i = 0; i < 256; ++i) r.mutable_samples(0)->add_token_ids(1);
  });
  expect_refused(sample + "sampler_logprobs.size",
                 [](R& r) { r.mutable_samples(0)->add_sampler_logprobs(-1); });
  for (const float bad : {kNan, kInf}) {
    expect_refused(sample + "sampler_logprobs[0]",
                   [&](R& r) { r.mutable_samples(0)->set_sampler_logprobs(0, bad); });
  }
  for (const float bad : {0.0f, -1.0f, kNan, kInf}) {
    expect_refused("rollout.temperature", [&](R& r) { r.set_temperature(bad); });
  }
  EXPECT_EQ(stack.Status().rollouts(), 0);
  v1::Rollout none;
  EXPECT_EQ(caller.Get("", &none).error_code(), StatusCode::INVALID_ARGUMENT);

  // A sample that was ended before its first token belongs to its group.
  v1::Rollout cut_short = SmallRollout();
  cut_short.add_samples();
  EXPECT_TRUE(caller.Put("id", cut_short).ok());
}

}  // namespace
}  // namespace coppice
