// P1 and the policy gate: versions, running requests, rollouts, idempotent and durable steps.
#include <gmock/gmock.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "server/engine/step_log.h"
#include "tests/server/engine/engine_fixture.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

using ::testing::Each;
using ::testing::HasSubstr;

std::string FreshDirectory(const std::string& name) {
  const std::string dir = absl::StrCat(::testing::TempDir(), "coppice_", name, "_", getpid());
  std::filesystem::remove_all(dir);
  std::filesystem::create_directories(dir);
  return dir;
}

TEST(PolicyTest, TheNextGenerateUsesTheNewWeightsAndNoOldKv) {
  EngineUnderTest test;
  const GenerateRequest request = Request(RandomPrompt(64, 1), 12);
  const auto before = test.Generate(request);
  const auto step = test.TrainStep(StepOnTokens("s1"));
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(step->policy_version, PolicyVersion{1});
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{1});
  const auto after = test.Generate(request);
  EXPECT_EQ(before->version, 0u);
  EXPECT_EQ(after->version, 1u);
  EXPECT_THAT(after->versions[0], Each(1u));
  EXPECT_EQ(after->usage.cached_device_tokens, 0);
  EXPECT_EQ(after->usage.computed_tokens, 64);
  EXPECT_EQ(after->usage.miss_reason, MissReason::kPolicyVersion);
  EXPECT_NE(after->tokens, before->tokens);
  // Nothing stale: a cold run under the new weights says the same.
  GenerateRequest cold = request;
  cold.cache_skip_read = cold.cache_skip_write = true;
  EXPECT_EQ(test.Generate(cold)->tokens, after->tokens);
  EXPECT_EQ(test.Generate(request)->usage.cached_device_tokens, 63);
  EXPECT_EQ(test.metrics().policy_version.Value(), 1);
  EXPECT_EQ(test.metrics().train_steps.Value(), 1);
  EXPECT_EQ(test.metrics().weight_sync_bytes.Value(), 0);
  test.ExpectNothingLeaked();
}

TEST(PolicyTest, DrainLetsRunningRequestsFinishAndNewOnesWait) {
  EngineUnderTest test;
  const auto running = test.Submit(Request(RandomPrompt(20, 1), 10, 2));
  test.Steps(3);
  Answer<TrainStepResult> step;
  test.engine().TrainStep(StepOnTokens("s1"), step.reply());
  const auto waiting = test.Submit(Request(RandomPrompt(20, 2), 4));
  test.Steps(2);
  EXPECT_FALSE(step.has());
  EXPECT_FALSE(waiting->started);
  test.RunAll();
  EXPECT_TRUE(step.get().ok());
  EXPECT_THAT(running->versions[0], Each(0u));
  EXPECT_THAT(waiting->versions[0], Each(1u));
}

TEST(PolicyTest, RetractKeepsTheTokensAndPrefillsAgain) {
  const GenerateRequest request = Request(RandomPrompt(20, 1), 10, 2);
  EngineUnderTest test;
  const auto sink = test.Submit(request);
  test.Steps(4);
  const size_t seen = sink->tokens[0].size();
  ASSERT_GT(seen, 0u);
  TrainStepRequest step = StepOnTokens("s1");
  step.running = RunningRequests::kRetract;
  Answer<TrainStepResult> answer;
  test.engine().TrainStep(step, answer.reply());
  test.Steps(1);
  EXPECT_TRUE(answer.has());
  test.RunAll();
  ASSERT_TRUE(sink->status.ok());
  const size_t kept = seen + (kOverlapByDefault ? 1 : 0);  // what was in flight is kept too
  for (size_t s = 0; s < 2; ++s) {
    for (size_t t = 0; t < 10; ++t) EXPECT_EQ(sink->versions[s][t], t < kept ? 0u : 1u);
  }
  // From there on it is as if the new policy had been given prompt and kept tokens: same seed, same
  // positions.
  std::vector<int32_t> path = request.prompt;
  path.insert(path.end(), sink->tokens[0].begin(), sink->tokens[0].begin() + kept);
  GenerateRequest rest = Request(path, 10 - static_cast<int32_t>(kept));
  const auto want = test.Generate(rest);
  EXPECT_EQ(std::vector<int32_t>(sink->tokens[0].begin() + kept, sink->tokens[0].end()),
            want->tokens[0]);
  test.ExpectNothingLeaked();
}

TEST(PolicyTest, KeepGoesOnWithTheOldKvAndPublishesNothing) {
  EngineUnderTest test;
  const auto sink = test.Submit(Request(RandomPrompt(20, 1), 40));
  test.Steps(4);
  TrainStepRequest step = StepOnTokens("s1");
  step.running = RunningRequests::kKeep;
  Answer<TrainStepResult> answer;
  test.engine().TrainStep(step, answer.reply());
  test.RunAll();
  EXPECT_TRUE(answer.get().ok());
  EXPECT_EQ(sink->versions[0].front(), 0u);
  EXPECT_EQ(sink->versions[0].back(), 1u);
  EXPECT_EQ(sink->usage.written_tokens, 16);  // the prompt's block, before the update
  std::vector<int32_t> path = RandomPrompt(20, 1);
  path.insert(path.end(), sink->tokens[0].begin(), sink->tokens[0].end());
  EXPECT_EQ(test.Generate(Request(path, 2))->usage.cached_device_tokens, 0);
  test.ExpectNothingLeaked();
}

TEST(PolicyTest, APrefillInFlightStartsAgainUnderTheNewWeights) {
  EngineOptions options;
  options.max_batch_rows = 16;
  for (const RunningRequests mode : {RunningRequests::kRetract, RunningRequests::kKeep}) {
    EngineUnderTest test(options);
    const auto sink = test.Submit(Request(RandomPrompt(100, 1), 5));
    test.Steps(3);
    TrainStepRequest step = StepOnTokens("s1");
    step.running = mode;
    Answer<TrainStepResult> answer;
    test.engine().TrainStep(step, answer.reply());
    test.RunAll();
    EXPECT_THAT(sink->versions[0], Each(1u));
    EXPECT_EQ(sink->usage.computed_tokens, 100);
    GenerateRequest cold = Request(RandomPrompt(100, 1), 5);
    cold.cache_skip_read = true;
    EXPECT_EQ(test.Generate(cold)->tokens, sink->tokens);
    test.ExpectNothingLeaked();
  }
}

TEST(PolicyTest, AStalledReaderDoesNotHoldADrainForEver) {
  EngineOptions options;
  options.max_reader_stall = absl::Seconds(20);
  EngineUnderTest test(options);
  const auto stalled = test.Submit(Request(RandomPrompt(20, 1), 50));
  test.Steps(3);
  stalled->room = false;
  Answer<TrainStepResult> step;
  test.engine().TrainStep(StepOnTokens("s1"), step.reply());
  test.RunAll();
  EXPECT_FALSE(step.has());
  test.clock().Advance(absl::Seconds(20));
  test.RunAll();
  EXPECT_EQ(stalled->status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(step.get().ok());
  test.ExpectNothingLeaked();
}

// ---- Idempotency

TEST(PolicyTest, ARepeatedStepReturnsTheFirstAnswer) {
  EngineUnderTest test;
  const auto first = test.TrainStep(StepOnTokens("s1"));
  const auto again = test.TrainStep(StepOnTokens("s1"));
  ASSERT_TRUE(first.ok() && again.ok());
  EXPECT_FALSE(first->repeated);
  EXPECT_TRUE(again->repeated);
  EXPECT_EQ(again->policy_version, PolicyVersion{1});
  EXPECT_EQ(again->batch.loss, first->batch.loss);
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{1});
}

TEST(PolicyTest, ARepeatOfARunningStepWaitsForIt) {
  EngineUnderTest test;
  const auto running = test.Submit(Request(RandomPrompt(20, 1), 20));
  test.Steps(3);
  Answer<TrainStepResult> first, again;
  test.engine().TrainStep(StepOnTokens("s1"), first.reply());
  test.engine().TrainStep(StepOnTokens("s1"), again.reply());
  test.RunAll();
  EXPECT_FALSE(first.get()->repeated);
  EXPECT_TRUE(again.get()->repeated);
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{1});
}

TEST(PolicyTest, AFailedStepLeavesNoRecordAndChangesNothing) {
  EngineUnderTest test;
  const auto want = test.Generate(Request(RandomPrompt(20, 1), 5));
  TrainStepRequest bad = StepOnTokens("s1");
  bad.batch.groups[0].samples[0].advantages = {1, 2};
  EXPECT_EQ(test.TrainStep(bad).status().code(), absl::StatusCode::kInvalidArgument);
  bad = StepOnTokens("s1");
  bad.optim.learning_rate = std::nanf("");
  EXPECT_EQ(test.TrainStep(bad).status().code(), absl::StatusCode::kInvalidArgument);
  bad = StepOnTokens("");
  EXPECT_EQ(test.TrainStep(bad).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(test.Status().pending_gradients);
  const auto same = test.Generate(Request(RandomPrompt(20, 1), 5));
  EXPECT_EQ(same->tokens, want->tokens);
  EXPECT_GT(same->usage.cached_device_tokens, 0);
  const auto good = test.TrainStep(StepOnTokens("s1"));
  ASSERT_TRUE(good.ok()) << good.status();
  EXPECT_FALSE(good->repeated);
}

TEST(PolicyTest, AStepWithoutMemoryForItsOptimizerLeavesNoGradients) {
  EngineUnderTest test, twin;
  Answer<TrainStepResult> earlier;
  test.engine().ForwardBackward(StepOnTokens("earlier"), earlier.reply());
  test.RunAll();
  ASSERT_TRUE(earlier.get().ok());
  test.device().FailAllocations();  // the optimizer's state is what a first step allocates last
  const absl::Status failed = test.TrainStep(StepOnTokens("s")).status();
  EXPECT_EQ(failed.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(failed.message()), testing::HasSubstr("1 earlier calls are dropped"));
  EXPECT_FALSE(test.Status().pending_gradients);
  test.device().AllowAllocations();

  const auto repeat = test.TrainStep(StepOnTokens("s"));
  ASSERT_TRUE(repeat.ok()) << repeat.status();
  EXPECT_FALSE(repeat->repeated);
  EXPECT_EQ(repeat->grad_norm, twin.TrainStep(StepOnTokens("s"))->grad_norm);
  Answer<TrainStepResult> again;
  test.engine().ForwardBackward(StepOnTokens("earlier"), again.reply());
  test.RunAll();
  EXPECT_FALSE(again.get()->repeated);
}

TEST(PolicyTest, ForwardBackwardAndOptimStepMakeATrainStep) {
  EngineUnderTest whole, halves;
  ASSERT_TRUE(whole.TrainStep(StepOnTokens("s1")).ok());
  Answer<TrainStepResult> forward, optim, repeat;
  halves.engine().ForwardBackward(StepOnTokens("s1"), forward.reply());
  halves.RunAll();
  EXPECT_TRUE(halves.Status().pending_gradients);
  EXPECT_EQ(forward.get()->policy_version, PolicyVersion{0});
  halves.engine().OptimStep(StepOnTokens("s1"), optim.reply());
  halves.engine().ForwardBackward(StepOnTokens("s1"), repeat.reply());
  halves.RunAll();
  EXPECT_EQ(optim.get()->policy_version, PolicyVersion{1});
  EXPECT_TRUE(repeat.get()->repeated);
  EXPECT_FALSE(halves.Status().pending_gradients);
  const GenerateRequest request = Request(RandomPrompt(20, 1), 8);
  EXPECT_EQ(halves.Generate(request)->tokens, whole.Generate(request)->tokens);
}

TEST(PolicyTest, AnotherVersionThanExpectedIsRefused) {
  EngineUnderTest test;
  TrainStepRequest step = StepOnTokens("s1");
  step.expected_policy_version = 3;
  const auto refused = test.TrainStep(step);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("want 3, got 0"));
  step.expected_policy_version = 0;
  EXPECT_TRUE(test.TrainStep(step).ok());
}

TEST(PolicyTest, DrainIsRefusedWhilePausedRequestsCannotFinish) {
  EngineUnderTest test;
  const auto sink = test.Submit(Request(RandomPrompt(20, 1), 20));
  test.Steps(3);
  Answer<int64_t> paused, resumed;
  test.engine().Pause(RunningRequests::kKeep, false, paused.reply());
  EXPECT_EQ(test.TrainStep(StepOnTokens("s1")).status().code(),
            absl::StatusCode::kFailedPrecondition);
  TrainStepRequest step = StepOnTokens("s1");
  step.running = RunningRequests::kRetract;
  EXPECT_TRUE(test.TrainStep(step).ok());
  test.engine().Resume(resumed.reply());
  test.RunAll();
  EXPECT_TRUE(sink->status.ok());
}

// ---- Rollouts

TEST(PolicyTest, ARolloutIsTrainedByItsId) {
  EngineUnderTest test;
  GenerateRequest request = Request(RandomPrompt(40, 1), 8, 4);
  request.retain = true;
  const auto sink = test.Generate(request);
  ASSERT_FALSE(sink->rollout_id.empty());
  EXPECT_EQ(test.Status().rollouts, 1);
  const auto step = test.TrainStep(StepOnRollout("s1", sink->rollout_id, 4));
  ASSERT_TRUE(step.ok()) << step.status();
  EXPECT_EQ(step->batch.tokens.flat, 4 * 47);  // a last token predicts nothing
  EXPECT_LE(step->batch.tokens.unique, 40 + 4 * 8);
  // On-policy: what was sampled and what the trainer computes agree.
  EXPECT_NEAR(step->batch.metrics.at("logprob_gap_mean"), 0, tolerance::kSamplerVersusTrainer);
}

TEST(PolicyTest, RolloutsAreCheckedBeforeAnythingChanges) {
  EngineUnderTest test;
  GenerateRequest request = Request(RandomPrompt(40, 1), 8, 2);
  request.retain = true;
  const std::string id = test.Generate(request)->rollout_id;
  const auto code = [&](TrainStepRequest step) { return test.TrainStep(step).status().code(); };
  EXPECT_EQ(code(StepOnRollout("a", "unknown", 2)), absl::StatusCode::kNotFound);
  EXPECT_EQ(code(StepOnRollout("a", id, 3)), absl::StatusCode::kInvalidArgument);
  TrainStepRequest other = StepOnRollout("a", id, 2);
  other.batch.loss.temperature = 0.5f;
  EXPECT_EQ(code(other), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{0});
  ASSERT_TRUE(test.TrainStep(StepOnTokens("b")).ok());
  EXPECT_EQ(code(StepOnRollout("a", id, 2)), absl::StatusCode::kFailedPrecondition);
  TrainStepRequest lagging = StepOnRollout("a", id, 2);
  lagging.max_policy_lag = 1;
  EXPECT_EQ(code(lagging), absl::StatusCode::kOk);
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{2});
}

TEST(PolicyTest, ARolloutIsKnownToItsTenantOnly) {
  EngineUnderTest test;
  GenerateRequest request = Request(RandomPrompt(40, 1), 8, 2);
  request.retain = true;
  request.tenant_salt = "a";
  TrainStepRequest step = StepOnRollout("s1", test.Generate(request)->rollout_id, 2);
  step.tenant_salt = "b";
  EXPECT_EQ(test.TrainStep(step).status().code(), absl::StatusCode::kNotFound);
  step.tenant_salt = "a";
  EXPECT_TRUE(test.TrainStep(step).ok());
}

TEST(PolicyTest, ABadRolloutIsRefusedBeforeAnyoneIsDrained) {
  EngineUnderTest test;
  const auto running = test.Submit(Request(RandomPrompt(20, 1), 50));
  test.Steps(3);
  Answer<TrainStepResult> step;
  test.engine().TrainStep(StepOnRollout("s1", "unknown", 2), step.reply());
  test.Steps(1);
  EXPECT_EQ(step.get().status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(running->done);
}

TEST(PolicyTest, TheOldestRolloutGoesFirst) {
  EngineOptions options;
  options.max_rollouts = 2;
  EngineUnderTest test(options);
  GenerateRequest request = Request(RandomPrompt(10, 1), 3, 2);
  request.retain = true;
  std::vector<std::string> ids;
  for (int i = 0; i < 3; ++i) ids.push_back(test.Generate(request)->rollout_id);
  EXPECT_EQ(test.Status().rollouts, 2);
  EXPECT_EQ(test.TrainStep(StepOnRollout("a", ids[0], 2)).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_TRUE(test.TrainStep(StepOnRollout("a", ids[2], 2)).ok());
}

// ---- Checkpoints

TEST(PolicyTest, ALoadedCheckpointMeetsNoKvOfAnotherHistory) {
  const std::string dir = FreshDirectory("load") + "/start";
  EngineUnderTest test;
  Answer<PolicyVersion> saved, loaded;
  test.engine().SaveCheckpoint(dir, saved.reply());
  test.RunAll();
  ASSERT_TRUE(saved.get().ok()) << saved.get().status();
  const GenerateRequest request = Request(RandomPrompt(64, 1), 8);
  const auto before = test.Generate(request);
  ASSERT_TRUE(test.TrainStep(StepOnTokens("s1")).ok());
  test.Generate(request);
  test.engine().LoadCheckpoint(dir, loaded.reply());
  test.RunAll();
  ASSERT_TRUE(loaded.get().ok()) << loaded.get().status();
  EXPECT_EQ(loaded.get().value(), PolicyVersion{0});
  const auto after = test.Generate(request);
  EXPECT_EQ(after->tokens, before->tokens);
  EXPECT_EQ(after->usage.cached_device_tokens, 0);
  // Another way to version 1: the step id is new again, and version 1's old KV stays out of reach.
  TrainStepRequest other = StepOnTokens("s1");
  other.batch.groups[0].samples[0].advantages = {-1};
  const auto step = test.TrainStep(other);
  ASSERT_TRUE(step.ok());
  EXPECT_FALSE(step->repeated);
  EXPECT_EQ(step->policy_version, PolicyVersion{1});
  EXPECT_EQ(test.Generate(request)->usage.cached_device_tokens, 0);
  Answer<PolicyVersion> missing;
  test.engine().LoadCheckpoint(dir + "_none", missing.reply());
  test.RunAll();
  EXPECT_EQ(missing.get().status().code(), absl::StatusCode::kNotFound);
}

TEST(PolicyTest, ADurableStepSurvivesTheDaemon) {
  EngineOptions options;
  options.trainer.step_log_dir = FreshDirectory("durable");
  const GenerateRequest request = Request(RandomPrompt(20, 1), 8);
  std::vector<std::vector<int32_t>> want;
  double loss = 0;
  {
    EngineUnderTest test(options);
    TrainStepRequest step = StepOnTokens("s1");
    step.durable = true;
    const auto result = test.TrainStep(step);
    ASSERT_TRUE(result.ok()) << result.status();
    loss = result->batch.loss;
    want = test.Generate(request)->tokens;
    ASSERT_TRUE(test.TrainStep(StepOnTokens("s2")).ok());  // not durable: may be lost
  }
  EngineUnderTest test(options);
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{1});
  EXPECT_EQ(test.Generate(request)->tokens, want);
  const auto repeat = test.TrainStep(StepOnTokens("s1"));
  ASSERT_TRUE(repeat.ok());
  EXPECT_TRUE(repeat->repeated);
  EXPECT_EQ(repeat->batch.loss, loss);
  const auto lost = test.TrainStep(StepOnTokens("s2"));
  EXPECT_FALSE(lost->repeated);
  EXPECT_EQ(lost->policy_version, PolicyVersion{2});
}

// Killed between the records of a step and its checkpoint: the answer is dropped with the weights.
// Also when the step's version is not above the checkpoint's, because an older checkpoint was
// loaded in between.
TEST(PolicyTest, AnAnswerWithoutItsWeightsIsDropped) {
  EngineOptions options;
  const std::string dir = FreshDirectory("torn");
  const std::string start = FreshDirectory("torn_start") + "/start";
  options.trainer.step_log_dir = dir;
  {
    EngineUnderTest test(options);
    Answer<PolicyVersion> saved, loaded;
    test.engine().SaveCheckpoint(start, saved.reply());
    TrainStepRequest step = StepOnTokens("s1");
    step.durable = true;
    ASSERT_TRUE(test.TrainStep(step).ok());
    for (const char* name : {"step-00000000", "step-00000000.json"}) {
      std::filesystem::copy(dir + "/" + name, dir + "/kept_" + name,
                            std::filesystem::copy_options::recursive);
    }
    test.engine().LoadCheckpoint(start, loaded.reply());
    test.RunAll();
    ASSERT_EQ(loaded.get().value(), PolicyVersion{0});
    step.step_id = "s2";
    ASSERT_EQ(test.TrainStep(step)->policy_version, PolicyVersion{1});
  }
  EXPECT_FALSE(std::filesystem::exists(dir + "/step-00000000"));  // replaced by the newer one
  std::filesystem::remove_all(dir + "/step-00000001");
  for (const char* name : {"step-00000000", "step-00000000.json"}) {
    std::filesystem::rename(dir + "/kept_" + name, dir + "/" + name);
  }
  EngineUnderTest test(options);
  EXPECT_FALSE(std::filesystem::exists(dir + "/step-00000001.json"));
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{1});
  EXPECT_TRUE(test.TrainStep(StepOnTokens("s1"))->repeated);
  EXPECT_FALSE(test.TrainStep(StepOnTokens("s2"))->repeated);
}

TEST(PolicyTest, AStepThatCannotReachTheDiskSaysSoAndMayBeRepeated) {
  EngineOptions options;
  const std::string dir = FreshDirectory("full");
  options.trainer.step_log_dir = dir;
  EngineUnderTest test(options);
  std::filesystem::remove_all(dir);
  TrainStepRequest step = StepOnTokens("s1");
  step.durable = true;
  const absl::Status lost = test.TrainStep(step).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(lost.message()), HasSubstr(dir + ": No such file or directory"));
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{1});
  std::filesystem::create_directories(dir);
  const auto repeat = test.TrainStep(step);
  ASSERT_TRUE(repeat.ok()) << repeat.status();
  EXPECT_TRUE(repeat->repeated);
  EXPECT_EQ(test.engine().policy_version(), PolicyVersion{1});
  EngineUnderTest again(options);
  EXPECT_EQ(again.engine().policy_version(), PolicyVersion{1});
}

// An empty log would start again from the model's own weights, and from number 0.
TEST(PolicyTest, ALogThatCannotBeListedIsNotAnEmptyOne) {
  const std::string file = FreshDirectory("listed") + "/file";
  std::ofstream(file) << "no directory";
  const StepLog log(file);
  EXPECT_EQ(log.Newest().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(log.Next().status().code(), absl::StatusCode::kUnavailable);
}

TEST(PolicyTest, ADamagedDurableStepStopsTheStartAndSaysWhatToDo) {
  EngineOptions options;
  options.trainer.step_log_dir = FreshDirectory("damaged");
  TrainStepRequest step = StepOnTokens("s1");
  step.durable = true;
  { ASSERT_TRUE(EngineUnderTest(options).TrainStep(step).ok()); }
  std::ofstream(options.trainer.step_log_dir + "/step-00000000/model.safetensors") << "x";
  const auto ops = ops::CreateOps("cpu", 1).value();
  Model model = RandomModel(TinyEngineModel(), 7, *ops).value();
  const auto decoder = Decoder::Create(model.config, *ops).value();
  Metrics metrics;
  options.num_blocks = 512;
  const absl::Status status =
      Engine::Create(options, model, *decoder, metrics, FakeClock()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("step-00000000 away to start without"));
}

TEST(PolicyTest, DurableWithoutADirectoryIsRefused) {
  EngineUnderTest test;
  TrainStepRequest step = StepOnTokens("s1");
  step.durable = true;
  EXPECT_EQ(test.TrainStep(step).status().code(), absl::StatusCode::kFailedPrecondition);
  step.durable = false;
  ASSERT_TRUE(test.TrainStep(step).ok());
  step.durable = true;
  EXPECT_EQ(test.TrainStep(step).status().code(), absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace coppice
