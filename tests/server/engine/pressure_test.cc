// Too few blocks, too many requests, readers that leave: nothing leaks and no answer changes.
#include <random>

#include "tests/server/engine/engine_fixture.h"

namespace coppice {
namespace {

// Six groups over a pool that holds about one and a half of them.
TEST(PressureTest, PreemptionDoesNotChangeTheTokens) {
  EngineOptions tiny;
  tiny.num_blocks = 14;
  tiny.block_tokens = 4;
  EngineOptions large = tiny;
  large.num_blocks = 512;
  EngineUnderTest under_pressure(tiny), at_ease(large);
  std::vector<std::shared_ptr<RecordingSink>> got, want;
  for (uint64_t i = 0; i < 6; ++i) {
    const GenerateRequest request =
        Request(RandomPrompt(9 + static_cast<int64_t>(i), i), 30, 2, 70 + i);
    got.push_back(under_pressure.Submit(request));
    want.push_back(at_ease.Submit(request));
  }
  under_pressure.RunAll();
  at_ease.RunAll();
  EXPECT_GT(under_pressure.metrics().preemptions.Value(), 0);
  EXPECT_EQ(at_ease.metrics().preemptions.Value(), 0);
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(got[i]->status.ok()) << got[i]->status;
    EXPECT_EQ(got[i]->tokens, want[i]->tokens) << "request " << i;
    EXPECT_EQ(got[i]->usage.prompt_tokens, 9 + static_cast<int32_t>(i));
  }
  under_pressure.ExpectNothingLeaked();
}

// A prompt whose logits are no numbers, and a sample that draws such a token on its way.
TEST(PressureTest, ARequestWithNothingToDrawEndsAlone) {
  constexpr int32_t kSpoilt = 200;
  const auto request = [=](uint64_t seed, float bias) {
    GenerateRequest r = Request(RandomPrompt(20, seed), 40, 2, seed);
    for (int32_t& token : r.prompt) token %= kSpoilt;
    r.sampling.logit_bias = {{kSpoilt, bias}};
    return r;
  };
  EngineUnderTest alone, test;
  std::vector<std::shared_ptr<RecordingSink>> want, got;
  for (const uint64_t seed : {1, 2, 3}) want.push_back(alone.Generate(request(seed, -100)));

  SetMinLogSeverity(LogSeverity::kWarning);
  testing::internal::CaptureStderr();
  test.SpoilToken(kSpoilt);
  got.push_back(test.Submit(request(1, -100)));
  GenerateRequest unreadable = request(4, -100);
  unreadable.prompt[7] = kSpoilt;
  const auto at_once = test.Submit(unreadable);
  got.push_back(test.Submit(request(2, -100)));
  test.Steps(3);
  const auto on_its_way = test.Submit(request(5, 100));
  got.push_back(test.Submit(request(3, -100)));
  test.RunAll();
  const std::string log = testing::internal::GetCapturedStderr();
  SetMinLogSeverity(LogSeverity::kError);
  const std::string line = "request_without_numbers request=\"\" prompt_tokens=20";
  const size_t first = log.find(line);
  ASSERT_NE(first, std::string::npos) << log;
  const size_t second = log.find(line, first + 1);
  ASSERT_NE(second, std::string::npos) << "a line for each request: " << log;
  EXPECT_EQ(log.find(line, second + 1), std::string::npos) << "not one for each sample: " << log;
  for (const auto& sink : {at_once, on_its_way}) {
    EXPECT_TRUE(sink->done);
    EXPECT_EQ(sink->status.code(), absl::StatusCode::kFailedPrecondition) << sink->status;
  }
  EXPECT_EQ(at_once->usage.completion_tokens, 0);
  EXPECT_EQ(on_its_way->tokens, std::vector<std::vector<int32_t>>(2, {kSpoilt}));
  for (size_t i = 0; i < got.size(); ++i) {
    EXPECT_TRUE(got[i]->status.ok()) << got[i]->status;
    EXPECT_EQ(got[i]->tokens, want[i]->tokens) << "request " << i;
  }
  test.ExpectNothingLeaked();
  EXPECT_EQ(test.Generate(request(2, -100))->tokens, want[1]->tokens);
}

// What it has computed would end whoever finds it in the cache.
TEST(PressureTest, ARequestWithNothingToDrawLeavesNothingInTheCache) {
  constexpr int32_t kSpoilt = 200;
  EngineUnderTest test;
  test.SpoilToken(kSpoilt);
  GenerateRequest request = Request(RandomPrompt(40, 1), 4);
  for (int32_t& token : request.prompt) token %= kSpoilt;
  request.sampling.logit_bias = {{kSpoilt, -100}};
  EXPECT_TRUE(test.Generate(request)->status.ok());
  EXPECT_GT(test.Status().cache.cached_only_blocks, 0);

  SetMinLogSeverity(LogSeverity::kError);
  request.prompt.back() = kSpoilt;
  EXPECT_EQ(test.Generate(request)->status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(test.Status().cache.cached_only_blocks, 0);
  test.ExpectNothingLeaked();
}

// One sample needs the whole pool.
TEST(PressureTest, ARequestThatJustFitsRuns) {
  EngineOptions options;
  options.num_blocks = 10;
  options.block_tokens = 4;
  EngineUnderTest test(options);
  const auto one = test.Submit(Request(RandomPrompt(20, 1), 20, 4));
  const auto other = test.Submit(Request(RandomPrompt(30, 2), 10, 1));
  test.RunAll();
  EXPECT_TRUE(one->done && one->status.ok());
  EXPECT_TRUE(other->done && other->status.ok());
  const auto sink = std::make_shared<RecordingSink>();
  EXPECT_EQ(test.engine().Submit(Request(RandomPrompt(20, 1), 21), sink).code(),
            absl::StatusCode::kInvalidArgument);
  test.ExpectNothingLeaked();
}

TEST(PressureTest, MoreSamplesThanRowsTakeTurns) {
  EngineOptions options;
  options.max_batch_rows = 8;
  options.max_running_samples = 32;
  EngineUnderTest test(options), wide;
  const GenerateRequest request = Request(RandomPrompt(20, 1), 10, 32);
  const auto narrow = test.Generate(request);
  EXPECT_EQ(narrow->tokens, wide.Generate(request)->tokens);
  test.ExpectNothingLeaked();
}

// Point 5: a thousand requests that end by cancel, deadline, abort, disconnect of a slow reader or
// at their last token, in a pool that is too small for them.
TEST(PressureTest, AThousandRandomEndsLeakNothing) {
  constexpr uint64_t kSeed = 20261121;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  EngineOptions options;
  options.num_blocks = 48;
  options.block_tokens = 4;
  options.max_batch_rows = 32;
  EngineUnderTest test(options);
  std::vector<std::shared_ptr<RecordingSink>> sinks;
  for (int i = 0; i < 1000; ++i) {
    std::vector<int32_t> prompt = RandomPrompt(40, random() % 4);  // few prompts: much sharing
    prompt.resize(1 + random() % 40);
    GenerateRequest request = Request(prompt, 1 + static_cast<int32_t>(random() % 12),
                                      1 + static_cast<int32_t>(random() % 4), random());
    request.request_id = std::to_string(i);
    request.priority = static_cast<int32_t>(random() % 2);
    request.cache_skip_read = random() % 8 == 0;
    request.cache_skip_write = random() % 8 == 0;
    if (random() % 4 == 0) {
      request.deadline =
          test.clock().Now() + absl::Milliseconds(static_cast<int64_t>(random() % 60));
    }
    sinks.push_back(test.Submit(request));
    RecordingSink& victim = *sinks[random() % sinks.size()];
    switch (random() % 4) {
      case 0:
        victim.cancelled = true;
        break;
      case 1:
        victim.room = !victim.room;
        break;
      case 2:
        test.engine().Abort(std::to_string(random() % (i + 1)), "", [](auto) {});
        break;
      default:
        break;
    }
    test.clock().Advance(absl::Milliseconds(5));
    test.Steps(static_cast<int>(random() % 4));
    const CacheStats stats = test.Status().cache;
    ASSERT_EQ(stats.free_blocks + stats.leased_blocks + stats.cached_only_blocks,
              stats.total_blocks);
  }
  for (const auto& sink : sinks) {
    if (!sink->room) sink->cancelled = true;
  }
  test.RunAll();
  for (const auto& sink : sinks) EXPECT_TRUE(sink->done);
  EXPECT_GT(test.metrics().preemptions.Value(), 0);
  test.ExpectNothingLeaked();
}

// A group whose reader is full is retracted; its prefill would be the producer of blocks that
// another request waits for.
TEST(PressureTest, AProducerWithoutReaderGivesWay) {
  EngineOptions options;
  options.max_batch_rows = 16;
  EngineUnderTest test(options);
  const std::vector<int32_t> prompt = RandomPrompt(200, 1);
  std::vector<int32_t> longer = prompt;
  longer.push_back(7);
  const auto full = test.Submit(Request(prompt, 5));
  test.Steps(3);
  const auto waiter = test.Submit(Request(longer, 5));
  full->room = false;
  test.RunAll();
  EXPECT_TRUE(waiter->done && waiter->status.ok());
  EXPECT_FALSE(full->done);
  full->room = true;
  test.RunAll();
  EXPECT_TRUE(full->status.ok());
  EXPECT_EQ(full->usage.prompt_tokens, 200);
  test.ExpectNothingLeaked();
}

TEST(PressureTest, FlushFreesWhatIsCachedOnly) {
  EngineUnderTest test;
  test.Generate(Request(RandomPrompt(100, 1), 10));
  const int64_t cached = test.Status().cache.cached_only_blocks;
  Answer<int64_t> freed;
  test.engine().FlushCache(freed.reply());
  test.RunAll();
  EXPECT_GT(cached, 0);
  EXPECT_EQ(freed.get().value(), cached);
  EXPECT_EQ(test.Status().cache.free_blocks, test.Status().cache.total_blocks);
}

}  // namespace
}  // namespace coppice
