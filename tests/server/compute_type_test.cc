#include "server/compute_type.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace coppice {
namespace {

using ::testing::HasSubstr;

Config OnCuda(const std::string& compute_dtype, const std::string& model = "") {
  Config config;
  config.device = "cuda";
  config.compute_dtype = compute_dtype;
  if (model.empty()) {
    config.model_geometry = "qwen3-4b";
  } else {
    config.model = std::string(COPPICE_SOURCE_DIR "/tests/parity/golden/tiny/") + model;
  }
  return config;
}

TEST(ComputeTypeTest, TheFlagWinsOverTheCheckpoint) {
  for (const char* model : {"", "llama_linear_tied", "qwen3_tied", "absent"}) {
    EXPECT_EQ(ChooseComputeType(OnCuda("bf16", model))->dtype, DType::kBF16);
    EXPECT_EQ(ChooseComputeType(OnCuda("f16", model))->dtype, DType::kF16);
  }
}

TEST(ComputeTypeTest, AutoTakesTheTypeOfTheCheckpoint) {
  EXPECT_EQ(Config().compute_dtype, "auto");
  EXPECT_EQ(ChooseComputeType(OnCuda("auto"))->dtype, DType::kBF16);
  EXPECT_EQ(ChooseComputeType(OnCuda("auto", "llama_linear_tied"))->dtype, DType::kBF16);
  EXPECT_EQ(ChooseComputeType(OnCuda("auto", "qwen3_tied"))->dtype, DType::kF16);
  EXPECT_EQ(ChooseComputeType(OnCuda("auto", "llama_llama3_sharded"))->dtype, DType::kF16);
  EXPECT_EQ(ChooseComputeType(OnCuda("auto", "absent")).status().code(),
            absl::StatusCode::kNotFound);
}

TEST(ComputeTypeTest, TheCpuComputesInF32) {
  Config config = OnCuda("f16", "absent");
  config.device = "cpu";
  EXPECT_EQ(ChooseComputeType(config)->dtype, DType::kF32);
}

TEST(ComputeTypeTest, GradientsInBf16AreRefusedWhereTheDeviceComputesInF16) {
  Config config = OnCuda("auto", "qwen3_tied");
  const ComputeType compute = *ChooseComputeType(config);
  EXPECT_TRUE(CheckGradientType(config, compute).ok());
  config.gradient_dtype = "bf16";
  const std::string message(CheckGradientType(config, compute).message());
  EXPECT_THAT(message, HasSubstr("(weights stored as f16), got bf16"));
  EXPECT_THAT(message, HasSubstr("use --gradient_dtype=f32 or --compute_dtype=bf16"));
  EXPECT_TRUE(CheckGradientType(config, {DType::kBF16, "--compute_dtype"}).ok());
  EXPECT_TRUE(CheckGradientType(config, {DType::kF32, "device cpu"}).ok());
}

}  // namespace
}  // namespace coppice
