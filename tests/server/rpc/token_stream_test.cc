#include "server/rpc/token_stream.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

// Records what reaches the connection; the test decides when a write is done.
class RecordingTransport final : public TokenStream::Transport {
 public:
  void Write(const v1::GenerateEvent* event) override {
    EXPECT_FALSE(in_flight) << "two writes at a time";
    in_flight = true;
    written.push_back(*event);
  }
  void Finish(const absl::Status& status) override {
    EXPECT_FALSE(in_flight) << "finished before the write was done";
    finishes.push_back(status);
  }

  bool in_flight = false;
  std::vector<v1::GenerateEvent> written;
  std::vector<absl::Status> finishes;
};

class TokenStreamTest : public ::testing::Test {
 protected:
  TokenStreamTest()
      : stream_({.capacity = 4, .prompt_echo = {1, 2}, .wake_engine = [this] { ++wakes_; }},
                transport_) {}

  void Chunk(int32_t token) {
    TokenChunk chunk;
    chunk.token_ids = {token};
    stream_.OnChunk(std::move(chunk));
  }
  void WriteDone(bool ok = true) {
    transport_.in_flight = false;
    stream_.WriteDone(ok);
  }
  // Completes writes until the stream is idle; returns the tokens in order.
  std::vector<int32_t> Drain() {
    while (transport_.in_flight) WriteDone();
    std::vector<int32_t> tokens;
    for (const v1::GenerateEvent& event : transport_.written) {
      for (const int32_t id : event.chunk().token_ids()) tokens.push_back(id);
    }
    return tokens;
  }

  int wakes_ = 0;
  RecordingTransport transport_;
  TokenStream stream_;
};

TEST_F(TokenStreamTest, KeepsOrderWithOneWriteInFlight) {
  stream_.OnStarted(5, Usage(), PolicyVersion{3});
  for (int32_t token = 0; token < 3; ++token) Chunk(token);
  EXPECT_EQ(transport_.written.size(), 1u);
  Usage usage;
  usage.completion_tokens = 3;
  stream_.OnDone(absl::OkStatus(), usage, "rollout-1", PolicyVersion{4});

  EXPECT_THAT(Drain(), ElementsAre(0, 1, 2));

  const v1::Started& started = transport_.written.front().started();
  EXPECT_EQ(started.seed(), 5u);
  EXPECT_EQ(started.policy_version(), 3u);
  EXPECT_THAT(started.prompt_token_ids(), ElementsAre(1, 2));
  const v1::GroupFinished& group = transport_.written.back().group();
  EXPECT_EQ(group.rollout_id(), "rollout-1");
  EXPECT_EQ(group.usage().completion_tokens(), 3);
  EXPECT_THAT(transport_.finishes, ElementsAre(absl::OkStatus()));
}

TEST_F(TokenStreamTest, SlowReaderPausesTheEngineAndWakesItHalfEmpty) {
  Chunk(0);  // in flight
  for (int32_t token = 1; token <= 4; ++token) {
    EXPECT_TRUE(stream_.HasRoom());
    Chunk(token);
  }
  EXPECT_FALSE(stream_.HasRoom());
  Chunk(5);  // the step that was under way
  WriteDone();
  WriteDone();
  EXPECT_EQ(wakes_, 0);
  WriteDone();
  EXPECT_EQ(wakes_, 1);
  EXPECT_TRUE(stream_.HasRoom());
  WriteDone();
  EXPECT_EQ(wakes_, 1) << "woken once per pause";
}

TEST_F(TokenStreamTest, CancelDropsWhatWaitsAndEndsAfterTheEngine) {
  for (int32_t token = 0; token < 3; ++token) Chunk(token);
  stream_.Cancel();
  EXPECT_TRUE(stream_.Cancelled());
  EXPECT_EQ(wakes_, 1);
  WriteDone(/*ok=*/false);
  EXPECT_EQ(transport_.written.size(), 1u);
  EXPECT_THAT(transport_.finishes, IsEmpty()) << "the engine still holds blocks";

  stream_.OnDone(absl::CancelledError("gone"), Usage(), "", PolicyVersion{0});

  ASSERT_EQ(transport_.finishes.size(), 1u);
  EXPECT_EQ(transport_.finishes[0].code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(transport_.written.size(), 1u);
}

TEST_F(TokenStreamTest, FailedWriteCancels) {
  Chunk(0);
  WriteDone(/*ok=*/false);
  EXPECT_TRUE(stream_.Cancelled());
  EXPECT_EQ(wakes_, 1);
}

TEST_F(TokenStreamTest, ErrorsEndTheCallAfterTheTokensBeforeThem) {
  Chunk(0);
  Chunk(1);
  stream_.OnDone(absl::UnavailableError("stopping"), Usage(), "", PolicyVersion{0});
  EXPECT_THAT(Drain(), ElementsAre(0, 1));
  ASSERT_EQ(transport_.finishes.size(), 1u);
  EXPECT_EQ(transport_.finishes[0].code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(transport_.written.back().has_group());
}

TEST_F(TokenStreamTest, RefusedRequestsFinishAtOnce) {
  stream_.Refuse(absl::ResourceExhaustedError("full"));
  EXPECT_TRUE(transport_.written.empty());
  ASSERT_EQ(transport_.finishes.size(), 1u);
}

}  // namespace
}  // namespace coppice
