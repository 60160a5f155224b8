#include "kernels/model/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/model/gguf_model.h"
#include "tests/model/file_builders.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class GgufTest : public testing::Test {
 protected:
  absl::StatusOr<std::unique_ptr<GgufFile>> Open(const std::string& bytes) const {
    return GgufFile::Open(directory_.Write("model.gguf", bytes));
  }
  void ExpectError(const std::string& bytes, absl::StatusCode code, const char* message) const {
    const auto file = Open(bytes);
    EXPECT_EQ(file.status().code(), code) << file.status();
    EXPECT_THAT(std::string(file.status().message()), HasSubstr(message));
  }

  TempDirectory directory_;
};

TEST_F(GgufTest, ReadsMetadataOfVersions2And3) {
  for (const uint32_t version : {2u, 3u}) {
    const auto file = Open(SmallLlamaGguf().Version(version).Build());
    ASSERT_TRUE(file.ok()) << file.status();
    std::string name;
    int64_t layers = 0;
    std::vector<absl::string_view> tokens;
    ASSERT_TRUE((*file)->Read("general.name", name).ok());
    ASSERT_TRUE((*file)->Read("llama.block_count", layers).ok());
    ASSERT_TRUE((*file)->Read("tokenizer.ggml.tokens", tokens).ok());
    EXPECT_EQ(name, "small");
    EXPECT_EQ(layers, 1);
    EXPECT_THAT(tokens, ElementsAre("<s>", "a", "b", "ab"));
    EXPECT_EQ((*file)->Read("general.name", layers).code(), absl::StatusCode::kInvalidArgument);
  }
}

// Half-precision 0.5 is 0x3800, -2 is 0xc000.
TEST_F(GgufTest, DequantisesEveryBlockType) {
  std::string nibbles, q8;
  for (int i = 0; i < 16; ++i) nibbles.push_back(static_cast<char>(i | (15 - i) << 4));
  for (int i = 0; i < 32; ++i) q8.push_back(static_cast<char>(i * 8 - 128));
  const std::string half = Bytes<uint16_t>(0x3800), minus_two = Bytes<uint16_t>(0xc000);
  GgufBuilder b;
  const auto add = [&](const char* name, uint32_t type, const std::string& data) {
    b.Tensor({.name = name, .type = "", .ggml_type = type, .shape = {1, 32}, .data = data});
  };
  add("q4_0", 2, half + nibbles);
  add("q4_1", 3, half + minus_two + nibbles);
  add("q8_0", 8, half + q8);
  const auto file = Open(b.Build());
  ASSERT_TRUE(file.ok()) << file.status();
  float q4_0[32], q4_1[32], q8_0[32];
  ASSERT_TRUE((*file)->FindTensor("q4_0")->ReadRows(0, 1, q4_0).ok());
  ASSERT_TRUE((*file)->FindTensor("q4_1")->ReadRows(0, 1, q4_1).ok());
  ASSERT_TRUE((*file)->FindTensor("q8_0")->ReadRows(0, 1, q8_0).ok());
  for (int i = 0; i < 32; ++i) {
    const float q = static_cast<float>(i < 16 ? i : 31 - i);
    EXPECT_EQ(q4_0[i], 0.5f * (q - 8)) << i;
    EXPECT_EQ(q4_1[i], 0.5f * q - 2) << i;
    EXPECT_EQ(q8_0[i], 0.5f * static_cast<float>(i * 8 - 128)) << i;
  }
}

TEST_F(GgufTest, WidensEveryHalfAndBf16Exactly) {
  std::string bits;
  for (uint32_t i = 0; i < 0x10000; ++i) bits += Bytes(static_cast<uint16_t>(i));
  GgufBuilder b;
  b.Tensor({.name = "f16", .type = "", .ggml_type = 1, .shape = {0x10000}, .data = bits});
  b.Tensor({.name = "bf16", .type = "", .ggml_type = 30, .shape = {0x10000}, .data = bits});
  const auto file = Open(b.Build());
  ASSERT_TRUE(file.ok()) << file.status();
  std::vector<float> f16(0x10000), bf16(0x10000);
  ASSERT_TRUE((*file)->FindTensor("f16")->ReadRows(0, 0x10000, f16.data()).ok());
  ASSERT_TRUE((*file)->FindTensor("bf16")->ReadRows(0, 0x10000, bf16.data()).ok());
  for (uint32_t i = 0; i < 0x10000; ++i) {
    // IEEE 754: (-1)^s 2^(e-15) 1.m, subnormal below e = 1, infinity and NaN at e = 31.
    const int exponent = i >> 10 & 31;
    const double mantissa = i & 1023;
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (exponent == 31) {
      EXPECT_EQ(mantissa == 0 ? std::isinf(f16[i]) : std::isnan(f16[i]), true) << i;
    } else {
      EXPECT_EQ(f16[i], i & 0x8000 ? -magnitude : magnitude) << i;
    }
    EXPECT_EQ(std::bit_cast<uint32_t>(bf16[i]), i << 16);
  }
}

TEST_F(GgufTest, PutsLlamaProjectionsBackInOrder) {
  // Two heads of 4 rows; the converter stores rows 0 2 1 3 of each head.
  std::vector<float> rows;
  for (const int head : {0, 4}) {
    for (const int row : {0, 2, 1, 3}) rows.push_back(static_cast<float>(head + row));
  }
  const auto open = [&](const char* name) {
    GgufBuilder b;
    b.Tensor({.name = name, .type = "", .ggml_type = 0, .shape = {8, 1}, .data = FloatBytes(rows)});
    return Open(b.Build());
  };
  ModelConfig config;
  config.head_dim = 4;
  std::vector<float> got(8);
  for (const char* part : {"q", "k"}) {
    const auto file = open(absl::StrCat("blk.0.attn_", part, ".weight").c_str());
    ASSERT_TRUE(file.ok()) << file.status();
    const auto source = MakeGgufTensorSource(**file, config);
    ASSERT_TRUE(source.ok()) << source.status();
    const std::string name = absl::StrCat("model.layers.0.self_attn.", part, "_proj.weight");
    ASSERT_TRUE((*source)->ReadRows(name, 0, 8, got.data()).ok());
    EXPECT_THAT(got, ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
    ASSERT_TRUE((*source)->ReadRows(name, 5, 7, got.data()).ok());
    EXPECT_EQ(got[0], 5);
    EXPECT_EQ(got[1], 6);
  }
  config.architecture = Architecture::kQwen2;  // stored as it is
  const auto file = open("blk.0.attn_q.weight");
  const auto source = MakeGgufTensorSource(**file, config);
  ASSERT_TRUE((*source)->ReadRows("model.layers.0.self_attn.q_proj.weight", 0, 8, got.data()).ok());
  EXPECT_EQ(got, rows);
}

TEST_F(GgufTest, RecoversLlama3ScalingFromItsDivisors) {
  const auto build = [&](float last) {
    GgufBuilder b = SmallLlamaGguf();
    b.Float32("llama.rope.freq_base", 500000.0f);
    // Wavelengths of head_dim 8: 6.3, 167, 4443, 118143; high frequencies keep, low ones divide
    // by 32.
    const double smooth = (8192 / (2 * M_PI * std::pow(500000.0, 0.5)) - 1) / 3;
    const float middle = static_cast<float>(1 / ((1 - smooth) / 32 + smooth));
    b.Tensor({.name = "rope_freqs.weight",
              .type = "",
              .ggml_type = 0,
              .shape = {4},
              .data = FloatBytes({1, 1, middle, last})});
    return Open(b.Build());
  };
  const auto file = build(32);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto config = ParseGgufConfig(**file);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.scaling, RopeConfig::Scaling::kLlama3);
  EXPECT_DOUBLE_EQ(config->rope.factor, 32);
  EXPECT_EQ(ParseGgufConfig(**build(8)).status().code(), absl::StatusCode::kUnimplemented);
}

TEST_F(GgufTest, BrokenFilesAreDataLoss) {
  const auto code = absl::StatusCode::kDataLoss;
  const std::string good = SmallLlamaGguf().Build();
  ExpectError("", code, "header");
  ExpectError("GGUX" + good.substr(4), code, "magic");
  ExpectError(good.substr(0, 20), code, "header");
  ExpectError(good.substr(0, 700), code, "file ends at byte 700");
  ExpectError(good.substr(0, good.size() - 64), code, "output_norm.weight");
  const std::string huge = Bytes<uint64_t>(~uint64_t{0});
  ExpectError(good.substr(0, 8) + huge + good.substr(16), code, "do not fit");
  ExpectError(good.substr(0, 16) + huge + good.substr(24), code, "do not fit");
  ExpectError(good.substr(0, 24) + huge + good.substr(32), code, "file ends");
  ExpectError(SmallLlamaGguf().Uint32("llama.block_count", 1).Build(), code, "listed twice");
  ExpectError(SmallLlamaGguf().Uint32("general.alignment", 0).Build(), code, "alignment");
  const TestTensor again{
      .name = "output_norm.weight", .type = "", .shape = {32}, .data = std::string(128, 0)};
  ExpectError(SmallLlamaGguf().Tensor(again).Build(), code, "listed twice");
}

TEST_F(GgufTest, ImpossibleTensorsAreDataLoss) {
  const auto with = [](std::vector<int64_t> shape, uint32_t type, std::string data) {
    return GgufBuilder()
        .Tensor({.name = "x",
                 .type = "",
                 .ggml_type = type,
                 .shape = std::move(shape),
                 .data = std::move(data)})
        .Build();
  };
  ExpectError(with({int64_t{1} << 62, 8}, 0, ""), absl::StatusCode::kDataLoss, "overflows");
  ExpectError(with({-1}, 0, ""), absl::StatusCode::kDataLoss, "overflows");
  ExpectError(with({2, 31}, 8, std::string(68, 0)), absl::StatusCode::kDataLoss, "does not fit");
  ExpectError(with({1 << 20}, 0, "abcd"), absl::StatusCode::kDataLoss, "want 4194304 bytes");
  ExpectError(with({1, 1, 1, 1, 1}, 0, "abcd"), absl::StatusCode::kDataLoss, "rank");
  ExpectError(with({1, 256}, 14, std::string(210, 0)), absl::StatusCode::kUnimplemented,
              "ggml type 14");
}

TEST_F(GgufTest, OverlappingTensorsAreDataLoss) {
  std::string bytes =
      GgufBuilder()
          .Tensor({.name = "a", .type = "", .shape = {16}, .data = std::string(64, 0)})
          .Tensor({.name = "b", .type = "", .shape = {16}, .data = std::string(64, 0)})
          .Build();
  const size_t offset_of_b = 24 + 2 * (8 + 1 + 4 + 8 + 4 + 8) - 8;
  bytes.replace(offset_of_b, 8, Bytes<uint64_t>(32));
  ExpectError(bytes, absl::StatusCode::kDataLoss, "overlap");
  bytes.replace(offset_of_b, 8, Bytes<uint64_t>(33));
  ExpectError(bytes, absl::StatusCode::kDataLoss, "multiple of 32");
}

TEST_F(GgufTest, ForeignVersionsAreUnimplemented) {
  for (const uint32_t version : {0u, 1u, 4u, 0x03000000u}) {
    ExpectError(GgufBuilder().Version(version).Build(), absl::StatusCode::kUnimplemented,
                "version");
  }
}

}  // namespace
}  // namespace coppice
