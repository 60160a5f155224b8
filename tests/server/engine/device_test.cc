// What a GPU must give as the CPU does: P4 bit for bit in deterministic mode, and a clear end when
// the device breaks.
#include <gtest/gtest.h>

#include "tests/server/engine/engine_fixture.h"
#include "tests/support/break_device.h"
#include "tests/support/test_ops.h"

namespace coppice {
namespace {

class EngineDeviceTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const auto ops = CreateTestOps(GetParam(), 1);
    if (SkipsDevice(GetParam(), ops.status())) GTEST_SKIP() << ops.status();
    ASSERT_TRUE(ops.ok()) << ops.status();
  }

  // An engine of its own on the device, deterministic.
  std::unique_ptr<EngineUnderTest> MakeEngine(EngineOptions options = {}) const {
    return std::make_unique<EngineUnderTest>(
        options, TinyDeviceModel(), CreateTestOps(GetParam(), 1, /*deterministic=*/true).value());
  }

  static GenerateRequest WithLogprobs(GenerateRequest request) {
    request.logprobs = LogprobMode::kRaw;
    return request;
  }
  // Tokens and the bits of their log-probs.
  static void ExpectSame(const RecordingSink& got, const RecordingSink& want,
                         const std::string& what) {
    EXPECT_EQ(got.tokens, want.tokens) << what;
    EXPECT_EQ(got.logprobs, want.logprobs) << what;
  }
};

TEST_P(EngineDeviceTest, HitAndColdRunsAgreeBitForBitAtEveryCut) {
  constexpr int kLength = 300;
  const std::vector<int32_t> prompt = RandomPrompt(kLength, 3);
  GenerateRequest request = WithLogprobs(Request(prompt, 8, 2));
  request.cache_skip_read = request.cache_skip_write = true;
  const auto want = MakeEngine()->Generate(request);
  ASSERT_TRUE(want->status.ok()) << want->status;
  request.cache_skip_read = request.cache_skip_write = false;
  for (const int cut : {1, 15, 16, 17, 63, 64, 65, 127, 129, 240, 255, 256, 257, 299, 300}) {
    const auto test = MakeEngine();
    std::vector<int32_t> warm(prompt.begin(), prompt.begin() + cut);
    for (int i = 0; i < 20; ++i) warm.push_back((prompt[std::min(cut, kLength - 1)] + 1) % 257);
    test->Generate(Request(warm, 1));
    const auto sink = test->Generate(request);
    EXPECT_GT(sink->usage.cached_device_tokens + (cut < 16 ? 1 : 0), 0);
    ExpectSame(*sink, *want, absl::StrCat("cut ", cut));
    test->ExpectNothingLeaked();
  }
}

TEST_P(EngineDeviceTest, AnyBatchGivesTheBitsOfBeingAlone) {
  std::vector<GenerateRequest> requests;
  for (const int length : {1, 7, 40, 64, 100, 257, 300}) {
    requests.push_back(WithLogprobs(Request(RandomPrompt(length, length), 12, 1 + length % 3)));
    requests.back().sampling.temperature = length % 2 == 0 ? 0 : 1;
  }
  std::vector<std::shared_ptr<RecordingSink>> alone;
  for (const GenerateRequest& request : requests) alone.push_back(MakeEngine()->Generate(request));
  for (const int64_t rows : {8, 64, 512}) {
    EngineOptions options;
    options.max_batch_rows = rows;
    const auto test = MakeEngine(options);
    std::vector<std::shared_ptr<RecordingSink>> sinks;
    for (const GenerateRequest& request : requests) {
      sinks.push_back(test->Submit(request));
      test->Steps(1);
    }
    test->RunAll();
    for (size_t i = 0; i < sinks.size(); ++i) {
      ExpectSame(*sinks[i], *alone[i], absl::StrCat(rows, " rows a step, request ", i));
    }
  }
}

TEST_P(EngineDeviceTest, LogitsThatAreNoNumbersEndTheirRequestAlone) {
  constexpr int32_t kSpoilt = 263;  // beyond the tokens of RandomPrompt
  GenerateRequest good = WithLogprobs(Request(RandomPrompt(40, 1), 30, 2));
  good.sampling.logit_bias = {{kSpoilt, -1000}};
  const auto want = MakeEngine()->Generate(good);
  GenerateRequest bad = Request(RandomPrompt(33, 2), 30);
  bad.sampling.logit_bias = {{kSpoilt, 1000}};  // drawn first, then read
  const auto test = MakeEngine();
  test->SpoilToken(kSpoilt);
  const auto survives = test->Submit(good), ends = test->Submit(bad);
  test->RunAll();
  EXPECT_EQ(ends->status.code(), absl::StatusCode::kFailedPrecondition) << ends->status;
  EXPECT_EQ(ends->tokens, std::vector<std::vector<int32_t>>{{kSpoilt}});
  EXPECT_TRUE(survives->status.ok()) << survives->status;
  ExpectSame(*survives, *want, "beside it");
  test->ExpectNothingLeaked();
}

TEST_P(EngineDeviceTest, MoreThanThePoolHoldsIsRefusedWithTheNumbers) {
  EngineOptions options;
  options.num_blocks = 4;
  const auto test = MakeEngine(options);
  auto sink = std::make_shared<RecordingSink>();
  const absl::Status status =
      test->engine().Submit(Request(RandomPrompt(60, 1), 100), std::move(sink));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_NE(status.message().find("need 10 blocks of 16 tokens"), absl::string_view::npos)
      << status;
  EXPECT_TRUE(test->Generate(Request(RandomPrompt(20, 1), 4))->status.ok());
}

INSTANTIATE_TEST_SUITE_P(Devices, EngineDeviceTest, testing::ValuesIn(kDevices));

// Last, and once: a broken context cannot be used again in this process.
class BrokenDeviceTest : public EngineDeviceTest {};

TEST_P(BrokenDeviceTest, EndsEveryStream) {
  const auto test = MakeEngine();
  const auto first = test->Submit(Request(RandomPrompt(20, 1), 50, 2));
  const auto second = test->Submit(Request(RandomPrompt(30, 2), 50));
  test->Steps(3);
  ASSERT_FALSE(first->done);
  OnCuda(GetParam()) ? BreakDevice() : test->device().Fail();
  test->RunAll();
  for (const auto& sink : {first, second}) {
    EXPECT_TRUE(sink->done);
    EXPECT_EQ(sink->status.code(), absl::StatusCode::kInternal) << sink->status;
  }
  auto late = std::make_shared<RecordingSink>();
  EXPECT_EQ(test->engine().Submit(Request({1, 2}, 1), late).code(), absl::StatusCode::kUnavailable);
}

INSTANTIATE_TEST_SUITE_P(Devices, BrokenDeviceTest, testing::Values("cpu", "cuda"));

}  // namespace
}  // namespace coppice
