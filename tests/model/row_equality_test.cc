// The self-test of deterministic mode, on every device, and on one whose products depend on the
// number of rows.
#include "kernels/model/row_equality.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "kernels/model/model_loader.h"
#include "tests/support/failing_ops.h"
#include "tests/support/test_ops.h"

namespace coppice {
namespace {

ModelConfig Config(Architecture architecture) {
  ModelConfig c;
  c.name = "tiny";
  c.architecture = architecture;
  c.num_layers = 2;
  c.hidden = 128;
  c.q_heads = 4;
  c.kv_heads = 2;
  c.head_dim = 64;
  c.ffn = 192;
  c.vocab = 512;
  c.max_positions = 1024;
  c.qkv_bias = architecture == Architecture::kQwen2;
  c.qk_norm = architecture == Architecture::kQwen3;
  return c;
}

absl::Status Check(const ModelConfig& config, ops::Ops& ops) {
  const Model model = *RandomModel(config, 3, ops);
  const std::unique_ptr<Decoder> decoder = *Decoder::Create(config, ops);
  return CheckRowEquality(*decoder, model.params, 16);
}

class RowEqualityTest : public testing::TestWithParam<const char*> {};

TEST_P(RowEqualityTest, HoldsInDeterministicMode) {
  auto ops = CreateTestOps(GetParam(), 2, /*deterministic=*/true);
  if (SkipsDevice(GetParam(), ops.status())) GTEST_SKIP() << ops.status();
  ASSERT_TRUE(ops.ok()) << ops.status();
  for (const Architecture architecture :
       {Architecture::kLlama, Architecture::kQwen2, Architecture::kQwen3}) {
    const absl::Status status = Check(Config(architecture), **ops);
    EXPECT_TRUE(status.ok()) << status;
  }
}

INSTANTIATE_TEST_SUITE_P(Devices, RowEqualityTest, testing::ValuesIn(kDevices));

// A product of few rows differs in the last bit of one element.
class RowSensitiveOps final : public FailingOps {
 public:
  explicit RowSensitiveOps(int64_t few_rows)
      : FailingOps(*ops::CreateOps("cpu", 1)), few_rows_(few_rows) {}

  absl::Status MatMul(const ops::MatMulParams& p) override {
    const absl::Status status = FailingOps::MatMul(p);
    if (p.c.dim(0) == few_rows_) p.c.f32()[0] = std::nextafter(p.c.f32()[0], 1e9f);
    return status;
  }

 private:
  const int64_t few_rows_;
};

TEST(RowEqualitySelfTest, NamesTheBatchThatDiffers) {
  for (const int64_t rows : {1, 8, 64, 257}) {
    RowSensitiveOps ops(rows);
    const absl::Status status = Check(Config(Architecture::kLlama), ops);
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
    EXPECT_NE(status.message().find("run without --deterministic"), absl::string_view::npos);
    EXPECT_NE(status.message().find(std::to_string(rows) + " rows"), absl::string_view::npos)
        << status;
  }
}

}  // namespace
}  // namespace coppice
