// Pieces of the tokenizer against plain definitions; agreement with Hugging Face's is in
// tests/parity.
#include "kernels/model/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "kernels/model/added_tokens.h"
#include "kernels/model/bpe.h"
#include "kernels/model/byte_level.h"
#include "kernels/model/pre_tokenizer.h"
#include "kernels/model/utf8.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// The definition: merge the leftmost pair of lowest rank until none is left.
std::vector<std::string> NaiveBpe(const std::string& text,
                                  const std::vector<std::pair<std::string, std::string>>& merges) {
  std::vector<std::string> parts;
  for (const char c : text) parts.emplace_back(1, c);
  for (;;) {
    size_t best_rank = merges.size(), best = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank] == std::make_pair(parts[i], parts[i + 1])) best_rank = rank, best = i;
      }
    }
    if (best_rank == merges.size()) return parts;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

TEST(BpeTest, EqualsTheNaiveDefinitionOnRandomVocabularies) {
  for (uint32_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 rng(seed);
    Bpe::Vocabulary vocabulary = {{"a", 0}, {"b", 1}, {"c", 2}};
    std::vector<std::string> tokens = {"a", "b", "c"};
    std::vector<std::pair<std::string, std::string>> merges;
    while (merges.size() < 40) {
      const auto pair =
          std::make_pair(tokens[rng() % tokens.size()], tokens[rng() % tokens.size()]);
      if (std::find(merges.begin(), merges.end(), pair) != merges.end()) continue;
      merges.push_back(pair);
      const std::string joined = pair.first + pair.second;
      if (vocabulary.try_emplace(joined, static_cast<int32_t>(tokens.size())).second) {
        tokens.push_back(joined);
      }
    }
    const auto bpe = Bpe::Create(vocabulary, merges, {});
    ASSERT_TRUE(bpe.ok()) << bpe.status();
    Bpe::Scratch scratch;
    for (int round = 0; round < 50; ++round) {
      std::string text(rng() % 60, ' ');
      for (char& c : text) c = static_cast<char>('a' + rng() % 3);
      std::vector<int32_t> ids, want;
      bpe->Encode(text, scratch, ids);
      for (const std::string& part : NaiveBpe(text, merges)) want.push_back(vocabulary[part]);
      ASSERT_EQ(ids, want) << text;
    }
  }
}

TEST(BpeTest, BytesOutsideTheVocabularyVanishOrBecomeUnknown) {
  const Bpe::Vocabulary vocabulary = {{"a", 0}, {"<unk>", 9}};
  Bpe::Scratch scratch;
  std::vector<int32_t> silent, each, fused;
  Bpe::Create(vocabulary, {}, {})->Encode("xxaxx", scratch, silent);
  Bpe::Create(vocabulary, {}, {.unknown_token = 9})->Encode("xxaxx", scratch, each);
  Bpe::Create(vocabulary, {}, {.unknown_token = 9, .fuse_unknown = true})
      ->Encode("xxaxx", scratch, fused);
  EXPECT_THAT(silent, ElementsAre(0));
  EXPECT_THAT(each, ElementsAre(9, 9, 0, 9, 9));
  EXPECT_THAT(fused, ElementsAre(9, 0, 9));
}

TEST(BpeTest, MergesOutsideTheVocabularyAreInvalid) {
  EXPECT_FALSE(Bpe::Create({{"a", 0}, {"b", 1}}, {{"a", "b"}}, {}).ok());
}

TEST(BpeTest, OneMillionBytesInOnePieceAreNoProblem) {
  Bpe::Vocabulary vocabulary = {{"a", 0}};
  std::vector<std::pair<std::string, std::string>> merges;
  for (std::string token = "a"; token.size() < 256; token += token) {
    merges.emplace_back(token, token);
    vocabulary[token + token] = static_cast<int32_t>(vocabulary.size());
  }
  Bpe::Scratch scratch;
  std::vector<int32_t> ids;
  Bpe::Create(vocabulary, merges, {})->Encode(std::string(1 << 20, 'a'), scratch, ids);
  EXPECT_EQ(ids.size(), (1u << 20) / 256);
}

TEST(Utf8Test, ReplacesMaximalSubparts) {
  // Unicode 15, table 3-8, and the cases of section 3.9.
  const std::string r = "\xEF\xBF\xBD";
  EXPECT_EQ(ReplaceInvalidUtf8("a\xF1\x80\x80\xE1\x80\xC2z"), "a" + r + r + r + "z");
  EXPECT_EQ(ReplaceInvalidUtf8("\xC0\xAF\xE0\x80\xBF"), r + r + r + r + r);
  EXPECT_EQ(ReplaceInvalidUtf8("\xED\xA0\x80"), r + r + r);
  EXPECT_EQ(ReplaceInvalidUtf8("\xF4\x91\x92\x93\xFF"), r + r + r + r + r);
  EXPECT_EQ(ReplaceInvalidUtf8("\xE2\x82"), r);
  EXPECT_EQ(ReplaceInvalidUtf8("\xF0\x9F\x98\x80"), "\xF0\x9F\x98\x80");
}

TEST(Utf8Test, EveryCodePointSurvivesARoundTrip) {
  for (uint32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    AppendUtf8(c, text);
    const Utf8Char decoded = DecodeUtf8(text);
    ASSERT_TRUE(decoded.valid && decoded.code_point == c &&
                decoded.length == static_cast<int>(text.size()))
        << c;
  }
}

TEST(Utf8Test, NormalisesCanonically) {
  EXPECT_EQ(NormalizeUnicode("e\u0301", UnicodeForm::kNfc), "\u00e9");
  EXPECT_EQ(NormalizeUnicode("\u00e9", UnicodeForm::kNfd), "e\u0301");
  EXPECT_EQ(NormalizeUnicode("\u1100\u1161\u11a8", UnicodeForm::kNfc), "\uac01");
  EXPECT_EQ(NormalizeUnicode("a\u0301\u0323", UnicodeForm::kNfd), "a\u0323\u0301");
  EXPECT_EQ(NormalizeUnicode("\u212b", UnicodeForm::kNfc), "\u00c5");
}

// A bubble sort of this run would take 10^11 steps.
TEST(Utf8Test, LongRunsOfCombiningMarksAreNoProblem) {
  std::string marks = "a", below, above;
  for (int i = 0; i < 300000; ++i) {
    marks += "\u0301\u0323";
    below += "\u0323";
    above += "\u0301";
  }
  EXPECT_EQ(NormalizeUnicode(marks, UnicodeForm::kNfd), "a" + below + above);
}

TEST(ByteLevelTest, AlphabetIsABijection) {
  EXPECT_EQ(ByteLevelToBytes("a\u0120\u010a!"), "a \n!");
  EXPECT_EQ(ByteLevelToBytes("a b"), std::nullopt);
  EXPECT_EQ(ByteLevelToBytes("\u4f60"), std::nullopt);
  std::string seen;
  for (uint32_t c = 0; c < 0x200; ++c) {
    std::string text;
    AppendUtf8(c, text);
    if (const auto bytes = ByteLevelToBytes(text)) seen += *bytes;
  }
  std::sort(seen.begin(), seen.end(),
            [](char a, char b) { return static_cast<uint8_t>(a) < static_cast<uint8_t>(b); });
  ASSERT_EQ(seen.size(), 256u);
  for (int b = 0; b < 256; ++b) EXPECT_EQ(static_cast<uint8_t>(seen[b]), b);
}

std::vector<std::string> Pieces(const Splitter& splitter, absl::string_view text) {
  std::vector<std::string> out;
  splitter.Split(text, [&](absl::string_view piece) { out.emplace_back(piece); });
  return out;
}

TEST(SplitterTest, IsolatesRemovesAndInverts) {
  using B = Splitter::Behavior;
  EXPECT_THAT(Pieces(*Splitter::Create("-+", B::kIsolated, false), "--a-b"),
              ElementsAre("--", "a", "-", "b"));
  EXPECT_THAT(Pieces(*Splitter::Create("-+", B::kRemoved, false), "--a-b"), ElementsAre("a", "b"));
  EXPECT_THAT(Pieces(*Splitter::Create("-+", B::kRemoved, true), "--a-b"), ElementsAre("--", "-"));
  EXPECT_THAT(Pieces(*Splitter::Create("x*", B::kIsolated, false), "\u00e9x\u00e9"),
              ElementsAre("\u00e9", "x", "\u00e9"));
  EXPECT_FALSE(Splitter::Create("(", B::kIsolated, false).ok());
}

// Backtracking without end must not hang the daemon: PCRE2's match limit ends it.
TEST(SplitterTest, CatastrophicPatternsEnd) {
  const auto splitter = Splitter::Create("(?:a+)+c", Splitter::Behavior::kIsolated, false);
  ASSERT_TRUE(splitter.ok());
  const std::string text = std::string(60, 'a') + "dc";
  EXPECT_EQ(absl::StrJoin(Pieces(*splitter, text), ""), text);
}

TEST(SplitterTest, LongRunsOfOneClassAreNoProblem) {
  for (const char* pattern : {kGpt2Pattern, kLlama3Pattern, kQwen2Pattern}) {
    const auto splitter = Splitter::Create(pattern, Splitter::Behavior::kIsolated, false);
    ASSERT_TRUE(splitter.ok());
    for (const char c : {' ', 'a', '\n', '!', '7'}) {
      const std::string text(300000, c);
      EXPECT_EQ(absl::StrJoin(Pieces(*splitter, text + "x"), ""), text + "x");
    }
  }
}

std::string SplitText(const AddedTokenSplitter& splitter, absl::string_view text) {
  std::string out;
  splitter.Split(
      text, [&](absl::string_view part) { absl::StrAppend(&out, "[", part, "]"); },
      [&](int32_t id) { absl::StrAppend(&out, id); });
  return out;
}

TEST(AddedTokensTest, LeftmostLongestWins) {
  AddedTokenSplitter splitter;
  splitter.Add({.id = 1}, "<a>");
  splitter.Add({.id = 2}, "<a><b>");
  splitter.Add({.id = 3}, "<b>c");
  EXPECT_EQ(SplitText(splitter, "x<a><b>c<a>"), "[x]2[c]1");
  EXPECT_EQ(SplitText(splitter, "<b>c<"), "3[<]");
  EXPECT_EQ(SplitText(splitter, ""), "");
}

TEST(AddedTokensTest, FlagsMoveTheEdges) {
  AddedTokenSplitter splitter;
  splitter.Add({.id = 1, .lstrip = true}, "<l>");
  splitter.Add({.id = 2, .rstrip = true}, "<r>");
  splitter.Add({.id = 3, .single_word = true}, "word");
  EXPECT_EQ(SplitText(splitter, "a \u3000<l> b"), "[a]1[ b]");
  EXPECT_EQ(SplitText(splitter, "a <r>\n b"), "[a ]2[b]");
  EXPECT_EQ(SplitText(splitter, "word sword word\u0301"), "3[ sword word\u0301]");
}

// Two letters, one merge, one special token.
constexpr char kJson[] = R"({
  "added_tokens": [{"id": 3, "content": "<s>", "special": true}],
  "normalizer": null, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
  "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
                     "special_tokens": {"<s>": {"ids": [3]}}},
  "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}})";

TEST(TokenizerTest, AddsSpecialTokensOnlyWhenAsked) {
  const auto tokenizer = Tokenizer::FromJson(kJson);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_THAT((*tokenizer)->Encode("ab<s>", true), ElementsAre(3, 2, 3));
  EXPECT_THAT((*tokenizer)->Encode("ab", false), ElementsAre(2));
  EXPECT_THAT((*tokenizer)->Encode("", true), ElementsAre(3));
  EXPECT_EQ((*tokenizer)->vocab_size(), 4);
  EXPECT_TRUE((*tokenizer)->IsSpecial(3));
  EXPECT_FALSE((*tokenizer)->IsSpecial(99));
  EXPECT_EQ((*tokenizer)->Decode({3, 2, 99, -5}, false), "<s>ab");
  EXPECT_EQ((*tokenizer)->Decode({3, 2}, true), "ab");
}

TEST(TokenizerTest, PartsWeDoNotHaveAreUnimplementedAndNamed) {
  struct Case {
    const char* from;
    const char* to;
  };
  for (const Case& c : {Case{"\"BPE\"", "\"Unigram\""}, Case{"\"ByteLevel\"", "\"Metaspace\""},
                        Case{"\"TemplateProcessing\"", "\"RobertaProcessing\""},
                        Case{"\"normalizer\": null", R"("normalizer": {"type": "Lowercase"})"},
                        Case{"\"type\": \"BPE\"", R"("type": "BPE", "byte_fallback": true)"}}) {
    const auto tokenizer = Tokenizer::FromJson(absl::StrReplaceAll(kJson, {{c.from, c.to}}));
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kUnimplemented) << c.to;
    EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr("want one of"));
  }
}

TEST(TokenizerTest, BrokenFilesAreInvalid) {
  for (const auto& [from, to] :
       std::vector<std::pair<std::string, std::string>>{{"\"ab\": 2", "\"ab\": 1"},
                                                        {"\"ab\": 2", "\"ab\": -1"},
                                                        {"\"ab\": 2", "\"ab\": 99999999"},
                                                        {"\"ab\": 2", "\"ab\": \"2\""},
                                                        {"\"a b\"", "\"ab\""},
                                                        {"\"a b\"", "\"a c\""},
                                                        {"\"a b\"", "7"},
                                                        {"{\"ids\": [3]}", "{\"ids\": 3}"},
                                                        {"\"id\": 3", "\"id\": null"}}) {
    const auto tokenizer = Tokenizer::FromJson(absl::StrReplaceAll(kJson, {{from, to}}));
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument) << to;
  }
}

TEST(StreamDecoderTest, HoldsBackUnfinishedCharacters) {
  // The bytes of U+1F600 as four tokens: F0 9F 98 80 in the byte-level alphabet.
  const auto tokenizer = Tokenizer::FromJson(R"({
    "added_tokens": [], "pre_tokenizer": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"ð": 0, "Ł": 1, "ĺ": 2, "Ģ": 3, "a": 4}, "merges": []}})");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  StreamDecoder whole(tokenizer->get());
  for (const int32_t id : {0, 1, 2}) EXPECT_EQ(whole.Push(id), "");
  EXPECT_EQ(whole.Push(3), "\U0001F600");
  EXPECT_EQ(whole.Finish(), "");
  StreamDecoder broken(tokenizer->get());
  for (const int32_t id : {0, 1}) EXPECT_EQ(broken.Push(id), "");
  EXPECT_EQ(broken.Push(4), "\uFFFDa");
  EXPECT_EQ(broken.Push(0), "");
  EXPECT_EQ(broken.Finish(), "\uFFFD");
}

}  // namespace
}  // namespace coppice
