// Token ids and decoded text of 2,000 strings agree with Hugging Face tokenizers, for SmolLM2 and
// for three small tokenizers that cover the other pre-tokenizers, normal forms, templates and flags
// of added tokens.
#include <gtest/gtest.h>

#include <cstring>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/model/gguf.h"
#include "kernels/model/mapped_file.h"
#include "kernels/model/tokenizer.h"
#include "tests/parity/golden.h"

namespace coppice {
namespace {

// Walks a golden .bin file: little-endian counts, bytes and ids.
class Reader {
 public:
  explicit Reader(const std::string& path) : bytes_(*ReadTextFile(path, 1 << 24)) {}
  bool done() const { return position_ == bytes_.size(); }

  template <typename T>
  T Take() {
    T value;
    CHECK_LE(position_ + sizeof(T), bytes_.size());
    std::memcpy(&value, bytes_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return value;
  }
  std::string TakeString() {
    const uint32_t size = Take<uint32_t>();
    position_ += size;
    CHECK_LE(position_, bytes_.size());
    return bytes_.substr(position_ - size, size);
  }
  std::vector<int32_t> TakeIds() {
    std::vector<int32_t> ids(Take<uint32_t>());
    for (int32_t& id : ids) id = Take<uint16_t>();
    return ids;
  }

 private:
  std::string bytes_;
  size_t position_ = 0;
};

std::unique_ptr<Tokenizer> LoadTokenizer(const std::string& name) {
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = absl::UnknownError("");
  if (name == "smollm2") {
    const auto gguf = GgufFile::Open(SmolLm2Path());
    CHECK(gguf.ok()) << gguf.status().ToString() << " (deploy/fetch_model.sh fetches it)";
    tokenizer = Tokenizer::FromGguf(**gguf);
  } else {
    const auto json = ReadTextFile(GoldenPath("tokenizers/" + name + ".json"), 1 << 24);
    CHECK_OK(json.status());
    tokenizer = Tokenizer::FromJson(*json);
  }
  CHECK_OK(tokenizer.status());
  return *std::move(tokenizer);
}

class TokenizerParityTest : public testing::TestWithParam<const char*> {
 protected:
  std::unique_ptr<Tokenizer> tokenizer_ = LoadTokenizer(GetParam());
  Reader strings_{GoldenPath("tokenizers/strings.bin")};
  Reader golden_{GoldenPath(absl::StrCat("tokenizers/", GetParam(), ".ids.bin"))};
};

TEST_P(TokenizerParityTest, IdsAndTextAgreeOnEveryString) {
  int count = 0;
  for (; !strings_.done(); ++count) {
    const std::string text = strings_.TakeString();
    const std::vector<int32_t> want = golden_.TakeIds();
    const std::string want_text = golden_.TakeString();
    EXPECT_EQ(tokenizer_->Encode(text, /*add_special=*/true), want)
        << "string " << count << ": " << absl::CHexEscape(text);
    EXPECT_EQ(tokenizer_->Decode(want, /*skip_special=*/true), want_text) << "string " << count;
  }
  EXPECT_TRUE(golden_.done());
  EXPECT_EQ(count, 2000);
}

// What a client of a stream sees, joined, is what it would have seen at once.
TEST_P(TokenizerParityTest, StreamedTextEqualsWholeText) {
  while (!strings_.done()) {
    strings_.TakeString();
    const std::vector<int32_t> ids = golden_.TakeIds();
    const std::string want = golden_.TakeString();
    StreamDecoder stream(tokenizer_.get());
    std::string got;
    for (const int32_t id : ids) got += stream.Push(id);
    got += stream.Finish();
    ASSERT_EQ(got, want);
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizers, TokenizerParityTest,
                         testing::Values("smollm2", "qwen2_style", "llama3_style", "gpt2_style"),
                         [](const auto& test_info) { return std::string(test_info.param); });

}  // namespace
}  // namespace coppice
