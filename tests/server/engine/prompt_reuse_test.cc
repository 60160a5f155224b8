// Generate(retain) keeps what it computed of a prompt; a training step of that rollout under the
// same policy does not run the prompt forward again and gives the same update.
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/server/engine/engine_fixture.h"
#include "tests/support/tolerances.h"
#include "trainer/prompt_state.h"

namespace coppice {
namespace {

constexpr int64_t kPrompt = 40;

EngineOptions Keeping(int64_t prompts) {
  EngineOptions options;
  options.prompt_state_bytes =
      prompts * PromptState::SizeBytes(TinyEngineModel(), ops::ActivationTypes(), kPrompt);
  return options;
}

GenerateRequest Retained(uint64_t prompt_seed, int32_t n = 4) {
  GenerateRequest request = Request(RandomPrompt(kPrompt, prompt_seed), 8, n);
  request.retain = true;
  return request;
}

int64_t Reused(EngineUnderTest& test, const TrainStepRequest& step) {
  const absl::StatusOr<TrainStepResult> result = test.TrainStep(step);
  EXPECT_TRUE(result.ok()) << result.status();
  return result.ok() ? result->batch.tokens.prompt_forward_skipped : -1;
}

TEST(PromptReuseTest, TheStepIsTheSameWithoutThePromptsForward) {
  EngineUnderTest plain, keeping(Keeping(1));
  const auto want_sink = plain.Generate(Retained(1)), sink = keeping.Generate(Retained(1));
  EXPECT_EQ(sink->tokens, want_sink->tokens);
  const auto want = plain.TrainStep(StepOnRollout("s1", want_sink->rollout_id, 4));
  const auto got = keeping.TrainStep(StepOnRollout("s1", sink->rollout_id, 4));
  ASSERT_TRUE(want.ok() && got.ok()) << got.status();
  EXPECT_EQ(want->batch.tokens.prompt_forward_skipped, 0);
  EXPECT_EQ(got->batch.tokens.prompt_forward_skipped, kPrompt);
  EXPECT_EQ(got->batch.tokens.unique, want->batch.tokens.unique);
  EXPECT_NEAR(got->batch.loss, want->batch.loss, tolerance::kTreeVersusFlat);
  EXPECT_NEAR(got->grad_norm, want->grad_norm, tolerance::kTreeVersusFlat * want->grad_norm);
  // The updated policies agree too.
  EXPECT_EQ(keeping.Generate(Retained(2))->tokens, plain.Generate(Retained(2))->tokens);
}

TEST(PromptReuseTest, PrefillInPiecesBesideOthersIsKeptToo) {
  EngineOptions options = Keeping(1);
  options.max_batch_rows = 16;
  EngineUnderTest test(options);
  const auto running = test.Submit(Request(RandomPrompt(10, 5), 60));
  test.Steps(3);
  const auto sink = test.Submit(Retained(1));
  test.RunAll();
  EXPECT_TRUE(running->done);
  EXPECT_EQ(Reused(test, StepOnRollout("s1", sink->rollout_id, 4)), kPrompt);
}

TEST(PromptReuseTest, WhatCameFromTheCacheHasNoState) {
  EngineUnderTest test(Keeping(4));
  test.Generate(Request(RandomPrompt(kPrompt, 1), 2));
  const auto sink = test.Generate(Retained(1));
  EXPECT_GT(sink->usage.cached_device_tokens, 0);
  EXPECT_EQ(Reused(test, StepOnRollout("s1", sink->rollout_id, 4)), 0);
  EXPECT_EQ(test.metrics().prompt_states_kept.Value(), 0);
  EXPECT_EQ(test.metrics().prompt_states_missed.Value(), 1);
}

// Two prompts with a common first block in one step: the second one waits for it and never runs it.
TEST(PromptReuseTest, WhatAnotherPromptComputesLeavesNoState) {
  EngineUnderTest test(Keeping(1));
  GenerateRequest second = Retained(2);
  const GenerateRequest first = Retained(1);
  std::copy_n(first.prompt.begin(), 16, second.prompt.begin());
  const auto computed = test.Submit(first), waited = test.Submit(second);
  test.RunAll();
  EXPECT_EQ(waited->usage.computed_tokens, kPrompt - 16);
  EXPECT_EQ(test.metrics().prompt_states_kept.Value(), 1);
  EXPECT_EQ(test.metrics().prompt_states_missed.Value(), 1);
  TrainStepRequest both = StepOnRollout("s1", computed->rollout_id, 4);
  const TrainStepRequest other = StepOnRollout("s1", waited->rollout_id, 4);
  both.batch.groups.push_back(other.batch.groups[0]);
  both.rollout_ids.push_back(other.rollout_ids[0]);
  both.rollout_samples.push_back(other.rollout_samples[0]);
  EXPECT_EQ(Reused(test, both), kPrompt);  // the first one's
}

TEST(PromptReuseTest, APromptGivenUpLeavesNoState) {
  EngineOptions options = Keeping(1);
  options.max_batch_rows = 16;
  EngineUnderTest test(options);
  const auto sink = test.Submit(Retained(1));
  test.Status();
  EXPECT_GT(test.metrics().prompt_state_bytes.Value(), 0);
  sink->cancelled = true;
  test.RunAll();
  test.Status();
  EXPECT_TRUE(sink->done);
  EXPECT_EQ(test.metrics().prompt_state_bytes.Value(), 0);
}

TEST(PromptReuseTest, TheOldestStateMakesRoom) {
  EngineUnderTest test(Keeping(2));
  std::vector<std::string> ids;
  for (const uint64_t prompt : {1, 2, 3}) {
    ids.push_back(test.Generate(Retained(prompt))->rollout_id);
    EXPECT_LE(test.metrics().prompt_state_bytes.Value(),
              static_cast<double>(Keeping(2).prompt_state_bytes));
  }
  const auto forward = [&](const std::string& step_id, const std::string& rollout) {
    Answer<TrainStepResult> answer;
    test.engine().ForwardBackward(StepOnRollout(step_id, rollout, 4), answer.reply());
    test.RunAll();
    return answer.get().value().batch.tokens.prompt_forward_skipped;
  };
  EXPECT_EQ(forward("a", ids[0]), 0);
  EXPECT_EQ(forward("b", ids[1]), kPrompt);
  EXPECT_EQ(forward("c", ids[2]), kPrompt);
}

TEST(PromptReuseTest, ANewPolicyDropsAllStates) {
  EngineUnderTest test(Keeping(4));
  const std::string id = test.Generate(Retained(1))->rollout_id;
  EXPECT_EQ(Reused(test, StepOnTokens("s1")), 0);
  test.Status();
  EXPECT_EQ(test.metrics().prompt_state_bytes.Value(), 0);
  TrainStepRequest lagging = StepOnRollout("s2", id, 4);
  lagging.max_policy_lag = 1;
  EXPECT_EQ(Reused(test, lagging), 0);
}

TEST(PromptReuseTest, NothingIsKeptUnlessAskedFor) {
  EngineUnderTest off, keeping(Keeping(4));
  EXPECT_EQ(Reused(off, StepOnRollout("s1", off.Generate(Retained(1))->rollout_id, 4)), 0);
  keeping.Generate(Request(RandomPrompt(kPrompt, 1), 8));
  keeping.Status();
  EXPECT_EQ(keeping.metrics().prompt_state_bytes.Value(), 0);
}

TEST(PromptReuseTest, TooLargeAPromptTrainsTheLongWay) {
  EngineOptions options = Keeping(1);
  options.prompt_state_bytes -= 1;
  EngineUnderTest test(options);
  EXPECT_EQ(Reused(test, StepOnRollout("s1", test.Generate(Retained(1))->rollout_id, 4)), 0);
  EXPECT_EQ(test.metrics().prompt_states_missed.Value(), 1);
}

}  // namespace
}  // namespace coppice
