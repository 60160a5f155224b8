// Score: prompts that the cache holds are read, not run; nobody can tell from the log-probs.
#include <gtest/gtest.h>

#include "tests/server/engine/engine_fixture.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

constexpr int64_t kBlockTokens = 16;

TrainGroup GroupOf(std::vector<int32_t> prompt, int samples, int64_t length, uint64_t seed) {
  TrainGroup group{.prompt = std::move(prompt)};
  for (int s = 0; s < samples; ++s) {
    group.samples.push_back({.tokens = RandomPrompt(length, seed + s)});
  }
  return group;
}

std::vector<SampleResult> Score(EngineUnderTest& test, const TrainGroup& group,
                                const std::string& tenant_salt = "") {
  Answer<ScoreResult> answer;
  test.engine().Score({.groups = {group}, .tenant_salt = tenant_salt}, answer.reply());
  test.RunAll();
  EXPECT_TRUE(answer.get().ok()) << answer.get().status();
  return answer.get().ok() ? answer.get()->samples : std::vector<SampleResult>();
}

int64_t CachedSoFar(EngineUnderTest& test) {
  return static_cast<int64_t>(test.metrics().score_prompt_tokens_cached.Value());
}

void ExpectNear(const std::vector<SampleResult>& got, const std::vector<SampleResult>& want) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t s = 0; s < got.size(); ++s) {
    ASSERT_EQ(got[s].logprobs.size(), want[s].logprobs.size());
    for (size_t t = 0; t < got[s].logprobs.size(); ++t) {
      EXPECT_NEAR(got[s].logprobs[t], want[s].logprobs[t], tolerance::kSamplerVersusTrainer);
    }
    EXPECT_NEAR(got[s].entropy, want[s].entropy, tolerance::kSamplerVersusTrainer);
  }
}

TEST(ScoreTest, ReadsThePromptFromTheCache) {
  for (const int64_t length : {1, 2, 15, 16, 17, 31, 32, 33, 64, 100}) {
    SCOPED_TRACE(length);
    const TrainGroup group = GroupOf(RandomPrompt(length, 5), 3, 9, 100);
    EngineUnderTest cold, warm;
    const std::vector<SampleResult> want = Score(cold, group);
    EXPECT_EQ(CachedSoFar(cold), 0);
    warm.Generate(Request(group.prompt, 4));
    ExpectNear(Score(warm, group), want);
    EXPECT_EQ(CachedSoFar(warm), (length - 1) / kBlockTokens * kBlockTokens);
    warm.ExpectNothingLeaked();
  }
}

TEST(ScoreTest, AGroupTooLargeForAPassIsCutBehindTheCache) {
  EngineOptions options;
  options.trainer.max_rows = 30;
  const TrainGroup group = GroupOf(RandomPrompt(50, 5), 6, 8, 100);
  EngineUnderTest whole, cut(options);
  cut.Generate(Request(group.prompt, 4));
  ExpectNear(Score(cut, group), Score(whole, group));
  EXPECT_EQ(CachedSoFar(cut), 48);
}

TEST(ScoreTest, ReadsNothingOfAnotherTenantOrPolicy) {
  const TrainGroup group = GroupOf(RandomPrompt(50, 5), 2, 8, 100);
  EngineUnderTest test, fresh;
  test.Generate(Request(group.prompt, 4));
  const std::vector<SampleResult> want = Score(fresh, group);
  ExpectNear(Score(test, group, "red"), want);
  EXPECT_EQ(CachedSoFar(test), 0);
  ASSERT_TRUE(test.TrainStep(StepOnTokens("s")).ok());
  ASSERT_TRUE(fresh.TrainStep(StepOnTokens("s")).ok());
  ExpectNear(Score(test, group), Score(fresh, group));
  EXPECT_EQ(CachedSoFar(test), 0);
}

TEST(ScoreTest, LogprobsThatAreNoNumbersEndTheirRequestAlone) {
  constexpr int32_t kSpoilt = 200;
  TrainGroup spoilt = GroupOf(RandomPrompt(20, 5), 3, 9, 100), sound = spoilt;
  for (TrainGroup* group : {&spoilt, &sound}) {
    for (int32_t& token : group->prompt) token %= kSpoilt;
    for (TrainSample& s : group->samples) {
      for (int32_t& token : s.tokens) token %= kSpoilt;
    }
  }
  EngineUnderTest test;
  const std::vector<SampleResult> want = Score(test, sound);
  test.SpoilToken(kSpoilt);
  spoilt.samples[1].tokens[3] = kSpoilt;
  Answer<ScoreResult> answer;
  test.engine().Score({.groups = {spoilt}}, answer.reply());
  test.RunAll();
  const absl::Status status = answer.get().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_NE(status.message().find("group 0 sample 1"), std::string::npos) << status;
  ExpectNear(Score(test, sound), want);
  test.ExpectNothingLeaked();
}

TEST(ScoreTest, ComputesNothingForACallerThatIsGone) {
  EngineUnderTest test;
  Answer<ScoreResult> answer;
  test.engine().Score(
      {.groups = {GroupOf(RandomPrompt(20, 5), 2, 8, 100)}, .abandoned = [] { return true; }},
      answer.reply());
  test.RunAll();
  EXPECT_EQ(answer.get().status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(test.metrics().score_prompt_tokens.Value(), 0);
}

// What is not computed yet is run, not waited for.
TEST(ScoreTest, ReadsOnlyWhatIsComputed) {
  EngineOptions options;
  options.max_batch_rows = 20;
  const TrainGroup group = GroupOf(RandomPrompt(60, 5), 2, 8, 100);
  EngineUnderTest test(options), fresh;
  const auto running = test.Submit(Request(group.prompt, 4));
  test.Steps(2);
  ASSERT_FALSE(running->started);
  Answer<ScoreResult> answer;
  test.engine().Score({.groups = {group}}, answer.reply());
  test.Steps(1);
  ASSERT_TRUE(answer.has());
  ExpectNear(answer.get()->samples, Score(fresh, group));
  EXPECT_GT(CachedSoFar(test), 0);
  EXPECT_LT(CachedSoFar(test), 48);
  test.RunAll();
  EXPECT_TRUE(running->status.ok());
  test.ExpectNothingLeaked();
}

}  // namespace
}  // namespace coppice
