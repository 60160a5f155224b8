// P2 (every prompt token once), P4 (a hit never changes an answer) and the honesty of usage and
// metrics.
#include "tests/server/engine/engine_fixture.h"

namespace coppice {
namespace {

void ExpectPromptMetrics(Metrics& m, double queried, double hit, double joined, double computed) {
  EXPECT_EQ(m.prompt_tokens_queried.Value(), queried);
  EXPECT_EQ(m.prompt_tokens_hit_device.Value(), hit);
  EXPECT_EQ(m.prompt_tokens_joined.Value(), joined);
  EXPECT_EQ(m.prompt_tokens_computed.Value(), computed);
}

TEST(PrefixSharingTest, GroupOfEightComputesItsPromptOnce) {
  EngineUnderTest test;
  const auto sink = test.Generate(Request(RandomPrompt(1000, 1), 5, 8));
  EXPECT_TRUE(sink->status.ok()) << sink->status;
  EXPECT_EQ(sink->usage.prompt_tokens, 1000);
  EXPECT_EQ(sink->usage.computed_tokens, 1000);
  EXPECT_EQ(sink->usage.completion_tokens, 40);
  ExpectPromptMetrics(test.metrics(), 1000, 0, 0, 1000);
  EXPECT_EQ(test.metrics().generation_tokens.Value(), 40);
  test.ExpectNothingLeaked();
}

TEST(PrefixSharingTest, EightCallsAtOnceComputeTheirCommonPromptOnce) {
  EngineUnderTest test;
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (uint64_t i = 0; i < 8; ++i) {
    sinks.push_back(test.Submit(Request(RandomPrompt(1000, 1), 5, 1, 100 + i)));
  }
  test.RunAll();
  int32_t computed = 0, joined = 0;
  for (const auto& sink : sinks) {
    EXPECT_TRUE(sink->status.ok()) << sink->status;
    computed += sink->usage.computed_tokens;
    joined += sink->usage.joined_tokens;
  }
  EXPECT_EQ(computed, 1000);
  EXPECT_EQ(joined, 7000);
  ExpectPromptMetrics(test.metrics(), 8000, 0, 7000, 1000);
  test.ExpectNothingLeaked();
}

TEST(PrefixSharingTest, CallsThatArriveDuringThePrefillJoinIt) {
  EngineOptions options;
  options.max_batch_rows = 64;  // the prefill takes many steps
  EngineUnderTest test(options);
  const auto first = test.Submit(Request(RandomPrompt(500, 1), 3));
  test.Steps(3);
  const auto second = test.Submit(Request(RandomPrompt(500, 1), 3));
  std::vector<int32_t> longer = RandomPrompt(500, 1);
  longer.insert(longer.end(), {9, 9, 9});
  const auto third = test.Submit(Request(longer, 3));
  test.RunAll();
  EXPECT_EQ(first->usage.computed_tokens, 500);
  EXPECT_EQ(second->usage.computed_tokens, 0);
  EXPECT_EQ(second->usage.joined_tokens, 500);
  EXPECT_EQ(second->tokens, first->tokens);
  EXPECT_EQ(third->usage.computed_tokens, 503 - 500 / 16 * 16);
  test.ExpectNothingLeaked();
}

TEST(PrefixSharingTest, WaiterTakesOverWhenTheProducerIsGone) {
  const std::vector<int32_t> prompt = RandomPrompt(500, 1);
  std::vector<int32_t> longer = prompt;
  longer.insert(longer.end(), {9, 9, 9});
  EngineOptions options;
  options.max_batch_rows = 64;
  EngineUnderTest cold(options);
  const auto want = cold.Generate(Request(longer, 6));

  EngineUnderTest test(options);
  const auto producer = test.Submit(Request(prompt, 3));
  test.Steps(3);
  const auto waiter = test.Submit(Request(longer, 6));
  test.Steps(1);
  producer->cancelled = true;
  test.RunAll();
  EXPECT_EQ(producer->status.code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(waiter->status.ok());
  EXPECT_EQ(waiter->tokens, want->tokens);
  EXPECT_GT(waiter->usage.computed_tokens, 100);
  test.ExpectNothingLeaked();
}

TEST(PrefixSharingTest, HitAndColdRunsAgreeAtEveryCut) {
  constexpr int kLength = 70;
  const std::vector<int32_t> prompt = RandomPrompt(kLength, 3);
  EngineUnderTest cold;
  GenerateRequest request = Request(prompt, 8, 2);
  request.cache_skip_read = request.cache_skip_write = true;
  const auto want = cold.Generate(request);
  request.cache_skip_read = request.cache_skip_write = false;

  for (int cut = 1; cut <= kLength; ++cut) {
    EngineUnderTest test;
    std::vector<int32_t> warm(prompt.begin(), prompt.begin() + cut);
    for (int i = 0; i < 20; ++i) warm.push_back((prompt[std::min(cut, kLength - 1)] + 1) % 257);
    test.Generate(Request(warm, 1));
    const auto sink = test.Generate(request);
    EXPECT_EQ(sink->tokens, want->tokens) << "cut " << cut;
    EXPECT_EQ(sink->usage.cached_device_tokens, std::min(cut, kLength - 1)) << "cut " << cut;
    test.ExpectNothingLeaked();
  }
}

TEST(PrefixSharingTest, FullHitRunsOneToken) {
  for (const int length : {1, 15, 16, 17, 32, 64}) {
    EngineUnderTest test;
    const GenerateRequest request = Request(RandomPrompt(length, 4), 20);
    const auto cold = test.Generate(request);
    const auto warm = test.Generate(request);
    EXPECT_EQ(warm->tokens, cold->tokens) << length;
    EXPECT_EQ(warm->usage.computed_tokens, 1) << length;
    test.ExpectNothingLeaked();
  }
}

TEST(PrefixSharingTest, ResponsesArePublishedForTheNextTurn) {
  EngineUnderTest test;
  const auto first = test.Generate(Request(RandomPrompt(40, 5), 40));
  std::vector<int32_t> next = RandomPrompt(40, 5);
  next.insert(next.end(), first->tokens[0].begin(), first->tokens[0].end());
  next.push_back(1);
  const auto second = test.Generate(Request(next, 3));
  EXPECT_EQ(first->usage.written_tokens, 79 / 16 * 16);
  EXPECT_EQ(second->usage.cached_device_tokens, 79 / 16 * 16);
}

TEST(PrefixSharingTest, SkipWriteLeavesNothingAndSkipReadFindsNothing) {
  EngineUnderTest test;
  GenerateRequest request = Request(RandomPrompt(50, 6), 20, 3);
  request.cache_skip_write = true;
  const auto unwritten = test.Generate(request);
  EXPECT_EQ(unwritten->usage.written_tokens, 0);
  EXPECT_EQ(test.Status().cache.cached_only_blocks, 0);
  request.cache_skip_write = false;
  request.cache_skip_read = true;
  const auto unread = test.Generate(request);
  EXPECT_EQ(unread->usage.computed_tokens, 50);
  EXPECT_EQ(unread->usage.miss_reason, MissReason::kOptedOut);
  EXPECT_EQ(unread->tokens, unwritten->tokens);
  EXPECT_EQ(test.Status().cache.cached_only_blocks, 3);  // the prompt's whole blocks
  request.cache_skip_read = false;
  const auto hit = test.Generate(request);
  EXPECT_EQ(hit->usage.cached_device_tokens, 48);
  EXPECT_EQ(hit->tokens, unwritten->tokens);
  test.ExpectNothingLeaked();
}

TEST(PrefixSharingTest, TenantsDoNotShare) {
  EngineUnderTest test;
  GenerateRequest request = Request(RandomPrompt(64, 7), 4);
  request.tenant_salt = "a";
  const auto a = test.Generate(request);
  request.tenant_salt = "b";
  const auto b = test.Generate(request);
  EXPECT_EQ(b->usage.computed_tokens, 64);
  EXPECT_EQ(b->tokens, a->tokens);
}

TEST(PrefixSharingTest, WarmCommitsWholeBlocks) {
  EngineUnderTest test;
  Answer<WarmResult> first, second;
  test.engine().Warm(Request(RandomPrompt(100, 8), 1), first.reply());
  test.RunAll();
  EXPECT_EQ(first.get()->usage.prompt_tokens, 96);
  EXPECT_EQ(first.get()->usage.computed_tokens, 96);
  test.engine().Warm(Request(RandomPrompt(100, 8), 1), second.reply());
  test.RunAll();
  EXPECT_EQ(second.get()->usage.cached_device_tokens, 96);
  const auto sink = test.Generate(Request(RandomPrompt(100, 8), 3));
  EXPECT_EQ(sink->usage.cached_device_tokens, 96);
  test.ExpectNothingLeaked();
}

TEST(PrefixSharingTest, WarmOfLessThanABlockIsAnsweredEmpty) {
  EngineUnderTest test;
  Answer<WarmResult> answer;
  test.engine().Warm(Request({1, 2, 3}, 1), answer.reply());
  test.RunAll();
  EXPECT_EQ(answer.get()->usage.prompt_tokens, 0);
  test.ExpectNothingLeaked();
}

}  // namespace
}  // namespace coppice
