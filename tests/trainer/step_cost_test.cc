#include "trainer/step_cost.h"

#include <gtest/gtest.h>

#include "kernels/model/parameters.h"

namespace coppice {
namespace {

constexpr ops::ActivationTypes kTypes = {DType::kBF16, DType::kF32};
constexpr int64_t kRows = 1000;
constexpr double kPairs = 1e6;

ModelConfig Config() {
  ModelConfig c;
  c.num_layers = 3;
  c.hidden = 64;
  c.q_heads = 4;
  c.kv_heads = 2;
  c.head_dim = 16;
  c.ffn = 160;
  c.vocab = 61;
  c.max_positions = 128;
  return c;
}

StepCost Cost(const Retention& retention, DType gradients = DType::kF32) {
  StepCost cost;
  cost.AddTree(Config(), kTypes, gradients, kRows, kPairs, retention);
  return cost;
}

TEST(StepCostTest, CountsTheProductsOfALayerThreeTimes) {
  const double layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 160;  // parameters of products
  EXPECT_EQ(Cost(Retain::kAll).flops, 3 * 6 * kRows * layer);
  EXPECT_EQ(Cost(Retain::kAll).recomputed, 0);
  EXPECT_EQ(Cost(Retain::kAll).bytes, 12.0 * NumParameterElements(Config()));
  EXPECT_EQ(Cost(Retain::kAll, DType::kBF16).bytes,
            12.0 * NumParameterElements(Config()) - 4 * 3 * layer);
}

TEST(StepCostTest, CountsWhatALevelRecomputes) {
  const double gate_up = 2 * 64 * 64 + 4 * 64 * 160, qkv = 2 * 64 * (64 + 2 * 32);
  EXPECT_EQ(Cost(Retain::kProjections).recomputed, 0);
  EXPECT_EQ(Cost(Retain::kLean).recomputed, 3 * kRows * gate_up);
  EXPECT_EQ(Cost({Retain::kLean, 1}).recomputed, 2 * kRows * gate_up);
  EXPECT_EQ(Cost(Retain::kPrompt).recomputed, 3 * kRows * (gate_up + qkv));
  EXPECT_EQ(Cost(Retain::kInputs).recomputed, 3 * (kRows * (gate_up + qkv) + 4 * kPairs * 64));
}

TEST(StepCostTest, ABetterTableNeverCostsMore) {
  double before = Cost(Retain::kInputs).Total();
  for (const Retention& r :
       {Retention(Retain::kInputs, 2), Retention(Retain::kPrompt), Retention(Retain::kLean),
        Retention(Retain::kLean, 2), Retention(Retain::kProjections), Retention(Retain::kAll)}) {
    EXPECT_LE(Cost(r).Total(), before) << r.ToString(3);
    before = Cost(r).Total();
  }
}

TEST(StepCostTest, AnotherTreeReadsTheWeightsAgain) {
  StepCost two = Cost(Retain::kAll);
  two += Cost(Retain::kAll);
  StepCost one;
  one.AddTree(Config(), kTypes, DType::kF32, 2 * kRows, 2 * kPairs, Retain::kAll);
  EXPECT_EQ(two.flops, one.flops);
  EXPECT_EQ(two.bytes, 2 * one.bytes);
  EXPECT_GT(two.Total(), one.Total());
}

}  // namespace
}  // namespace coppice
