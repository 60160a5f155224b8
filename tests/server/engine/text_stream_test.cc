#include "server/engine/text_stream.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/support/byte_tokenizer.h"

namespace coppice {
namespace {

struct Streamed {
  std::string text;
  bool stopped = false;
  size_t tokens = 0;
};

Streamed Stream(const std::string& input, std::vector<std::string> stops) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, std::move(stops));
  Streamed out;
  for (char c : input) {
    out.text += stream.Push(static_cast<unsigned char>(c));
    ++out.tokens;
    if (stream.stopped()) break;
  }
  out.text += stream.Finish();
  out.stopped = stream.stopped();
  return out;
}

TEST(TextStreamTest, CutsAtAStopStringAcrossTokens) {
  const Streamed out = Stream("one two END three", {"END"});
  EXPECT_EQ(out.text, "one two ");
  EXPECT_TRUE(out.stopped);
  EXPECT_EQ(out.tokens, 11u);
}

TEST(TextStreamTest, HoldsBackOnlyWhatMayBecomeAStopString) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {"abc"});
  EXPECT_EQ(stream.Push('x'), "x");
  EXPECT_EQ(stream.Push('a'), "");
  EXPECT_EQ(stream.Push('b'), "");
  EXPECT_EQ(stream.Push('a'), "ab");
  EXPECT_EQ(stream.Push('d'), "ad");
  EXPECT_EQ(stream.Push('a'), "");
  EXPECT_EQ(stream.Finish(), "a");
}

TEST(TextStreamTest, HoldsBackHalfACharacter) {
  const ByteTokenizer tokenizer;
  TextStream stream(&tokenizer, {});
  EXPECT_EQ(stream.Push(0xC3), "");
  EXPECT_EQ(stream.Push(0xA9), "\xC3\xA9");
}

// Against the obvious: cut the whole text at the first stop string that completes.
TEST(TextStreamTest, AgreesWithCuttingTheWholeText) {
  constexpr uint64_t kSeed = 8;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (int round = 0; round < 2000; ++round) {
    std::string input;
    for (uint64_t i = random() % 30; i > 0; --i) input += static_cast<char>('a' + random() % 2);
    std::vector<std::string> stops(1 + random() % 2);
    for (std::string& stop : stops) {
      for (uint64_t i = 1 + random() % 5; i > 0; --i) stop += static_cast<char>('a' + random() % 2);
    }
    std::string want = input;
    bool stopped = false;
    for (size_t end = 1; end <= input.size() && !stopped; ++end) {
      size_t cut = std::string::npos;
      for (const std::string& stop : stops) cut = std::min(cut, input.substr(0, end).find(stop));
      if (cut == std::string::npos) continue;
      want = input.substr(0, cut);
      stopped = true;
    }
    const Streamed out = Stream(input, stops);
    EXPECT_EQ(out.text, want) << input << " until " << stops[0];
    EXPECT_EQ(out.stopped, stopped);
  }
}

}  // namespace
}  // namespace coppice
