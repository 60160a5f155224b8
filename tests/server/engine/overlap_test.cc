// Overlap: a decoding step is queued before the one before it is read; nobody can tell from what
// they are told.
#include <gtest/gtest.h>

#include <map>

#include "tests/server/engine/engine_fixture.h"

namespace coppice {
namespace {

// Writes down when batches are queued ("Q") and read ("R").
class OrderOps final : public FailingOps {
 public:
  OrderOps(std::unique_ptr<ops::Ops> inner, std::string* order)
      : FailingOps(std::move(inner)), order_(*order) {}

  absl::StatusOr<std::unique_ptr<ops::PendingSample>> StartSample(
      const ops::SampleParams& p) override {
    order_ += 'Q';
    auto inner = FailingOps::StartSample(p);
    if (!inner.ok()) return inner;
    return std::make_unique<Pending>(*std::move(inner), order_);
  }

 private:
  class Pending final : public ops::PendingSample {
   public:
    Pending(std::unique_ptr<ops::PendingSample> inner, std::string& order)
        : inner_(std::move(inner)), order_(order) {}
    absl::Status Wait() override {
      order_ += 'R';
      return inner_->Wait();
    }

   private:
    std::unique_ptr<ops::PendingSample> inner_;
    std::string& order_;
  };

  std::string& order_;
};

std::unique_ptr<EngineUnderTest> MakeEngine(bool overlap, std::string* order = nullptr) {
  EngineOptions options;
  options.overlap = overlap;
  auto device = ops::CreateOps("cpu", 1).value();
  if (order != nullptr) device = std::make_unique<OrderOps>(std::move(device), order);
  return std::make_unique<EngineUnderTest>(options, TinyEngineModel(), std::move(device));
}

TEST(OverlapTest, ADecodingStepIsQueuedBeforeTheLastOneIsRead) {
  std::string order;
  MakeEngine(true, &order)->Generate(Request(RandomPrompt(20, 1), 6));
  EXPECT_EQ(order, "QRQQRQRQRQRR") << "the prompt's own draw, then five that follow each other";
  order.clear();
  MakeEngine(false, &order)->Generate(Request(RandomPrompt(20, 1), 6));
  EXPECT_EQ(order, "QRQRQRQRQRQR");
}

// Samples that end at every length, by length or stop token, beside each other: rows queued for
// what has ended touch nobody, and tokens carried over skip the gaps.
TEST(OverlapTest, TokensAreThoseOfStepByStep) {
  for (uint64_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(seed);
    std::map<bool, std::vector<std::shared_ptr<RecordingSink>>> told;
    for (const bool overlap : {false, true}) {
      const auto test = MakeEngine(overlap);
      std::mt19937_64 random(seed);
      for (int i = 0; i < 6; ++i) {
        GenerateRequest request =
            Request(RandomPrompt(1 + static_cast<int>(random() % 40), seed + i % 3),
                    1 + static_cast<int>(random() % 40), 1 + static_cast<int>(random() % 5));
        request.sampling.temperature = 1;
        request.sampling.seed = random();
        request.sampling.ignore_eos = true;
        for (int t = 0; t < 12; ++t) {
          request.sampling.stop_token_ids.push_back(static_cast<int32_t>(random() % 257));
        }
        request.logprobs = LogprobMode::kRaw;
        request.top_logprobs = static_cast<int32_t>(random() % 3);
        told[overlap].push_back(test->Submit(request));
        test->Steps(static_cast<int>(random() % 20));
      }
      test->RunAll();
      test->ExpectNothingLeaked();
    }
    for (size_t i = 0; i < told[true].size(); ++i) {
      EXPECT_EQ(told[true][i]->tokens, told[false][i]->tokens);
      EXPECT_EQ(told[true][i]->logprobs, told[false][i]->logprobs);
      EXPECT_EQ(told[true][i]->finished, told[false][i]->finished);
      EXPECT_EQ(told[true][i]->usage.completion_tokens, told[false][i]->usage.completion_tokens);
    }
  }
}

// What an answer leaves in the cache is right although its last row was queued blindly.
TEST(OverlapTest, TheNextTurnContinuesFromWhatTheLastOneLeft) {
  for (int length = 1; length < 40; ++length) {
    const auto test = MakeEngine(true);
    GenerateRequest first = Request(RandomPrompt(30, 5), length);
    const std::vector<int32_t> answer = test->Generate(first)->tokens[0];
    GenerateRequest next = Request(RandomPrompt(30, 5), 12);
    next.prompt.insert(next.prompt.end(), answer.begin(), answer.end());
    next.prompt.push_back(7);
    const auto warm = test->Generate(next);
    EXPECT_GE(warm->usage.cached_device_tokens, 16);
    EXPECT_EQ(warm->tokens, MakeEngine(false)->Generate(next)->tokens) << length;
  }
}

TEST(OverlapTest, AnAbortedRequestHearsWhatWasInFlightFirst) {
  const auto test = MakeEngine(true);
  GenerateRequest request = Request(RandomPrompt(20, 1), 100);
  request.request_id = "r";
  const auto sink = test->Submit(request);
  test->Steps(8);
  const size_t before = sink->tokens[0].size();
  Answer<AbortResult> answer;
  test->engine().Abort("r", "", answer.reply());
  test->engine().StepForTest();
  ASSERT_TRUE(answer.has());
  EXPECT_TRUE(sink->done);
  EXPECT_EQ(sink->tokens[0].size(), before + 1);
  test->ExpectNothingLeaked();
}

TEST(OverlapTest, AnErrorOfTheDeviceEndsWhatIsInFlight) {
  const auto test = MakeEngine(true);
  const auto sink = test->Submit(Request(RandomPrompt(20, 1), 100));
  test->Steps(6);
  test->device().Fail();
  test->Steps(2);
  EXPECT_TRUE(sink->done);
  EXPECT_EQ(sink->status.code(), absl::StatusCode::kInternal);
}

}  // namespace
}  // namespace coppice
