#include "kernels/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "tests/model/file_builders.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class SafetensorsTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<TensorSource>> Open(const std::string& bytes) const {
    return OpenSafetensors(directory_.Write("model.safetensors", bytes));
  }
  void ExpectError(const std::string& bytes, absl::StatusCode code, const char* message) const {
    const auto file = Open(bytes);
    EXPECT_EQ(file.status().code(), code) << file.status();
    EXPECT_THAT(std::string(file.status().message()), HasSubstr(message));
  }
  // A header with one F32 tensor "a" of this shape and these offsets over 16 bytes of data.
  void ExpectEntryError(const char* shape, const char* offsets, const char* message) const {
    const std::string header = absl::StrCat(R"({"a":{"dtype":"F32","shape":)", shape,
                                            R"(,"data_offsets":)", offsets, "}}");
    ExpectError(SafetensorsBytes(header, std::string(16, 0)), absl::StatusCode::kDataLoss, message);
  }

  TempDirectory directory_;
};

TEST_F(SafetensorsTest, ReadsEveryDtypeAndRowRanges) {
  const auto file = Open(SafetensorsBytes({
      {.name = "m", .type = "F32", .shape = {3, 2}, .data = FloatBytes({1, 2, 3, 4, 5, 6})},
      {.name = "h",
       .type = "F16",
       .shape = {2},
       .data = Bytes<uint16_t>(0x3800) + Bytes<uint16_t>(0xc000)},
      {.name = "b", .type = "BF16", .shape = {1, 1}, .data = Bytes<uint16_t>(0x3fc0)},
  }));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT((*file)->Names(), ElementsAre("m", "h", "b"));
  EXPECT_THAT(*(*file)->Shape("m"), ElementsAre(3, 2));
  float out[4];
  ASSERT_TRUE((*file)->ReadRows("m", 1, 3, out).ok());
  EXPECT_THAT(out, ElementsAre(3, 4, 5, 6));
  ASSERT_TRUE((*file)->ReadRows("h", 0, 2, out).ok());
  EXPECT_EQ(out[0], 0.5f);
  EXPECT_EQ(out[1], -2.0f);
  ASSERT_TRUE((*file)->ReadRows("b", 0, 1, out).ok());
  EXPECT_EQ(out[0], 1.5f);
  EXPECT_EQ((*file)->ReadRows("m", 2, 4, out).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ((*file)->ReadRows("m", -1, 1, out).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ((*file)->Shape("x").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(SafetensorsTest, BrokenHeadersAreDataLoss) {
  const auto code = absl::StatusCode::kDataLoss;
  ExpectError("", code, "header");
  ExpectError("1234567", code, "header");
  ExpectError(Bytes<uint64_t>(~uint64_t{0}) + "{}", code, "got 18446744073709551615");
  ExpectError(Bytes<uint64_t>(~uint64_t{0} - 7) + "{}", code, "header");
  ExpectError(Bytes<uint64_t>(3) + "{}", code, "header");
  ExpectError(Bytes<uint64_t>(0), code, "header");
  ExpectError(SafetensorsBytes("{", ""), code, "JSON");
  ExpectError(SafetensorsBytes("[]", ""), code, "JSON object");
  ExpectError(SafetensorsBytes(R"({"a":1})", ""), absl::StatusCode::kUnimplemented, "dtype");
}

TEST_F(SafetensorsTest, ImpossibleTensorsAreDataLoss) {
  ExpectEntryError("[4]", "[0, 12]", "want 16 bytes");
  ExpectEntryError("[5]", "[0, 20]", "inside the 16 data bytes");
  ExpectEntryError("[4]", "[16, 0]", "inside");
  ExpectEntryError("[4]", "[0]", "inside");
  ExpectEntryError("[-4]", "[0, 16]", "shape");
  ExpectEntryError("[4.0]", "[0, 16]", "shape");
  ExpectEntryError("\"4\"", "[0, 16]", "shape");
  ExpectEntryError("[9223372036854775807, 2]", "[0, 16]", "want -1 bytes");
  ExpectEntryError("[18446744073709551615]", "[0, 16]", "below 2^63");
  ExpectEntryError("[4]", "[18446744073709551600, 18446744073709551616]", "below 2^63");
}

TEST_F(SafetensorsTest, OverlapAndRepetitionAreDataLoss) {
  const std::string a = R"("a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]})";
  const std::string b = R"("b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]})";
  ExpectError(SafetensorsBytes("{" + a + "," + b + "}", std::string(12, 0)),
              absl::StatusCode::kDataLoss, "overlap");
  ExpectError(SafetensorsBytes("{" + a + "," + a + "}", std::string(12, 0)),
              absl::StatusCode::kDataLoss, "a is listed twice");
}

TEST_F(SafetensorsTest, ForeignDtypesAreUnimplemented) {
  ExpectError(
      SafetensorsBytes({{.name = "x", .type = "I64", .shape = {1}, .data = std::string(8, 0)}}),
      absl::StatusCode::kUnimplemented, "want one of F32, F16, BF16");
}

class ShardedSafetensorsTest : public SafetensorsTest {
 protected:
  void WriteShards() const {
    directory_.Write(
        "one.safetensors",
        SafetensorsBytes({{.name = "a", .type = "F32", .shape = {1}, .data = FloatBytes({1})}}));
    directory_.Write(
        "two.safetensors",
        SafetensorsBytes({{.name = "b", .type = "F32", .shape = {1}, .data = FloatBytes({2})}}));
  }
  absl::Status OpenWithMap(const char* weight_map) const {
    directory_.Write("model.safetensors.index.json",
                     absl::StrCat(R"({"weight_map":)", weight_map, "}"));
    return OpenSafetensorsDirectory(directory_.path()).status();
  }
};

TEST_F(ShardedSafetensorsTest, FindsEveryTensorInItsShard) {
  WriteShards();
  ASSERT_TRUE(OpenWithMap(R"({"a":"one.safetensors","b":"two.safetensors"})").ok());
  const auto source = OpenSafetensorsDirectory(directory_.path());
  float out = 0;
  ASSERT_TRUE((*source)->ReadRows("b", 0, 1, &out).ok());
  EXPECT_EQ(out, 2);
  EXPECT_EQ((*source)->Names().size(), 2u);
}

TEST_F(ShardedSafetensorsTest, IndexAndShardsMustAgree) {
  WriteShards();
  EXPECT_EQ(OpenWithMap(R"({"a":"two.safetensors","b":"one.safetensors"})").code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(OpenWithMap(R"({"a":"one.safetensors"})").code(), absl::StatusCode::kOk);
  EXPECT_EQ(OpenWithMap(R"({"a":"one.safetensors","b":"one.safetensors"})").code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(OpenWithMap(R"({"a":"three.safetensors"})").code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(OpenWithMap(R"({"a":"../one.safetensors"})").code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(OpenWithMap(R"({"a":7})").code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(OpenWithMap("[]").code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace coppice
