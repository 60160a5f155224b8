// Drives every kind of load through the RPCs and checks that every registered metric moves: a
// metric that nothing updates is a lie on a dashboard.
#include <unistd.h>

#include <filesystem>
#include <map>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/metric_family.h"
#include "tests/support/serving_stack.h"

namespace coppice {
namespace {

using Values = std::map<std::string, double>;

// One number per time series: counter and gauge values, the count of a histogram.
Values Read(Metrics& metrics) {
  Values values;
  for (const prometheus::MetricFamily& family : metrics.registry().Collect()) {
    for (const prometheus::ClientMetric& metric : family.metric) {
      std::string name = family.name;
      for (const auto& label : metric.label)
        absl::StrAppend(&name, "{", label.name, "=", label.value, "}");
      values[name] = metric.counter.value + metric.gauge.value +
                     static_cast<double>(metric.histogram.sample_count);
    }
  }
  return values;
}

class EveryMetricMovesTest : public ::testing::Test {
 protected:
  static ServingStack::Options SmallPool() {
    ServingStack::Options options;
    options.engine.num_blocks = 24;
    options.engine.max_context = 256;
    options.engine.max_queued_requests = 2;
    options.engine.prompt_state_bytes = int64_t{1} << 20;
    options.checkpoint_dir = testing::TempDir() + absl::StrCat("every_metric_moves_", getpid());
    return options;
  }

  // Notes which series have changed since the last look; gauges come and go.
  void Look() {
    for (const auto& [name, value] : Read(stack_.metrics)) {
      if (value != last_[name]) moved_.insert(name);
      last_[name] = value;
    }
  }

  Completion Run(const v1::GenerateRequest& request) {
    grpc::ClientContext context;
    auto reader = stack_.generation->Generate(&context, request);
    Completion completion;
    v1::GenerateEvent event;
    while (reader->Read(&event)) {
      Add(event, completion);
      Look();
    }
    completion.status = reader->Finish();
    Look();
    return completion;
  }

  void HitsAndMisses();
  void FinishReasons();
  void JoinedPrefillAndPreemption();
  void QueueFullAndAborted();
  void PauseThatAborts();
  void Scoring();
  void Training();
  void AnotherPolicy();
  grpc::Status Step(const std::string& id, const std::string& rollout_id, float learning_rate);

  ServingStack stack_{SmallPool()};
  Values last_ = Read(stack_.metrics);
  std::set<std::string> moved_;
};

void EveryMetricMovesTest::HitsAndMisses() {
  Run(TestRequest(64, 4));  // none_stored
  Run(TestRequest(64, 4));  // hit
  Run(TestRequest(70, 4));  // below_block: six tokens more
  v1::GenerateRequest opted_out = TestRequest(64, 4);
  opted_out.mutable_cache()->set_skip_read(true);
  Run(opted_out);
  for (int first = 2; first < 8; ++first) Run(TestRequest(128, 2, first));  // evicts
  Run(TestRequest(64, 4));                                                  // evicted
}

void EveryMetricMovesTest::FinishReasons() {
  v1::GenerateRequest request = TestRequest(20, 30);
  const int32_t token = Run(request).tokens[0][5];
  request.mutable_sampling()->add_stop_token_ids(token);
  Run(request);
  v1::GenerateRequest text = TestRequest(20, 60);
  // Every byte that can end a one-byte string stops.
  for (const char c : std::string("aeiou stnr")) {
    text.mutable_sampling()->add_stop_strings(std::string(1, c));
  }
  for (uint64_t seed = 0; seed < 8; ++seed) {
    text.mutable_sampling()->set_seed(seed);
    Run(text);
  }
  Run(TestRequest(250, 100));  // context_full
}

void EveryMetricMovesTest::JoinedPrefillAndPreemption() {
  // Two equal prompts wait, then start in the same step.
  grpc::ClientContext pause, resume, first_context, second_context;
  v1::PauseResponse paused;
  v1::ResumeResponse resumed;
  stack_.admin->Pause(&pause, {}, &paused);
  auto first = stack_.generation->Generate(&first_context, TestRequest(100, 2, 9));
  auto second = stack_.generation->Generate(&second_context, TestRequest(100, 2, 9));
  stack_.AwaitStatus([](const auto& status) { return status.queued_requests() == 2; });
  stack_.Status();  // gauges are set at the end of a turn
  Look();
  const Completion refused = Run(TestRequest(20, 2));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  stack_.admin->Resume(&resume, {}, &resumed);
  EXPECT_TRUE(ReadAll(*first).status.ok());
  EXPECT_TRUE(ReadAll(*second).status.ok());
  Look();
  // Four samples of 200 tokens do not fit 24 blocks of 16.
  v1::GenerateRequest large = TestRequest(20, 200);
  large.set_n(4);
  EXPECT_TRUE(Run(large).status.ok());
}

// On a busy machine an answer may be complete before its end is asked for; then the next one is.
void EveryMetricMovesTest::QueueFullAndAborted() {
  while (stack_.metrics.requests_aborted.Value() == 0) {
    grpc::ClientContext context;
    auto reader = stack_.generation->Generate(&context, TestRequest(20, 200));
    v1::GenerateEvent event;
    reader->Read(&event);
    context.TryCancel();
    ReadAll(*reader);
    stack_.AwaitIdle();
    stack_.Status();
  }
  Look();
}

void EveryMetricMovesTest::PauseThatAborts() {
  v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED;
  while (reason != v1::FINISH_REASON_PAUSED) {
    grpc::ClientContext context, pause, resume;
    auto reader = stack_.generation->Generate(&context, TestRequest(20, 200));
    v1::GenerateEvent event;
    ASSERT_TRUE(reader->Read(&event));
    v1::PauseRequest abort;
    abort.set_abort(true);
    v1::PauseResponse paused;
    ASSERT_TRUE(stack_.admin->Pause(&pause, abort, &paused).ok());
    reason = ReadAll(*reader).reasons.at(0);
    v1::ResumeResponse resumed;
    ASSERT_TRUE(stack_.admin->Resume(&resume, {}, &resumed).ok());
  }
  Look();
}

// What the first request leaves in the cache, scoring reads.
void EveryMetricMovesTest::Scoring() {
  const v1::GenerateRequest request = TestRequest(64, 4);
  Run(request);
  v1::ScoreRequest score;
  v1::ScoreGroup* group = score.add_groups();
  *group->mutable_prompt() = request.prompt().tokens();
  group->add_responses()->add_ids(1);
  v1::ScoreResponse scored;
  grpc::ClientContext context;
  const grpc::Status status = stack_.generation->Score(&context, score, &scored);
  EXPECT_TRUE(status.ok()) << status.error_message();
  Look();
}

// Weights that were loaded are another model to the cache, whatever their version.
void EveryMetricMovesTest::AnotherPolicy() {
  Run(TestRequest(64, 4));
  grpc::ClientContext save_context, load_context;
  v1::SaveCheckpointRequest save;
  save.set_name("policy");
  v1::SaveCheckpointResponse saved;
  ASSERT_TRUE(stack_.training->SaveCheckpoint(&save_context, save, &saved).ok());
  v1::LoadCheckpointRequest load;
  load.set_name("policy");
  v1::LoadCheckpointResponse loaded;
  ASSERT_TRUE(stack_.training->LoadCheckpoint(&load_context, load, &loaded).ok());
  Run(TestRequest(64, 4));  // namespace
  std::filesystem::remove_all(saved.path());
}

grpc::Status EveryMetricMovesTest::Step(const std::string& id, const std::string& rollout_id,
                                        float learning_rate) {
  v1::TrainStepRequest request;
  request.set_step_id(id);
  request.mutable_optim()->set_learning_rate(learning_rate);
  request.set_max_policy_lag(100);
  v1::Group* group = request.add_groups();
  group->set_rollout_id(rollout_id);
  for (int sample = 0; sample < 2; ++sample) {
    group->add_samples()->set_rollout_sample(sample);
    group->mutable_samples(sample)->set_reward(static_cast<float>(sample));
  }
  grpc::ClientContext context;
  v1::TrainStepResponse response;
  const grpc::Status status = stack_.training->TrainStep(&context, request, &response);
  Look();
  return status;
}

void EveryMetricMovesTest::Training() {
  v1::GenerateRequest request = TestRequest(40, 6);
  request.set_n(2);
  request.set_retain(true);
  const std::string rollout_id = Run(request).rollout_id;  // cached in part: its state is missed
  v1::GenerateRequest fresh = TestRequest(40, 6, 11);
  fresh.set_n(2);
  fresh.set_retain(true);
  EXPECT_TRUE(Step("kept", Run(fresh).rollout_id, 0).ok());
  const grpc::Status step = Step("step", rollout_id, 1e-3f);
  EXPECT_TRUE(step.ok()) << step.error_message();
  Run(TestRequest(40, 6));  // policy_version
  // Weights that overflow make the next gradient norm infinite: that step is skipped.
  EXPECT_TRUE(Step("overflow", rollout_id, 1e38f).ok());
  EXPECT_TRUE(Step("skipped", rollout_id, 1e-3f).ok());
}

TEST_F(EveryMetricMovesTest, UnderLoad) {
  HitsAndMisses();
  FinishReasons();
  JoinedPrefillAndPreemption();
  QueueFullAndAborted();
  PauseThatAborts();
  Scoring();
  AnotherPolicy();
  Training();

  // What only other deployments can move: recurrent models and routers; and a phase that this
  // trainer does not have.
  const std::set<std::string> elsewhere = {
      "coppice_prompt_tokens_missed_total{reason=no_state_checkpoint}",
      "coppice_prompt_tokens_missed_total{reason=routed_elsewhere}",
      "coppice_train_step_phase_seconds{phase=other}"};
  const std::string zero_by_design = "coppice_weight_sync_bytes_total";
  EXPECT_EQ(last_.count(zero_by_design), 1u);
  EXPECT_EQ(last_[zero_by_design], 0);
  for (const auto& [name, value] : last_) {
    if (name == zero_by_design || elsewhere.count(name) > 0) continue;
    EXPECT_EQ(moved_.count(name), 1u) << name << " never moved";
  }
}

}  // namespace
}  // namespace coppice
