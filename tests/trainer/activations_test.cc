#include "trainer/activations.h"

#include <gtest/gtest.h>

namespace coppice {
namespace {

constexpr int64_t kRows = 96, kHeadRows = 33;
constexpr ops::ActivationTypes kTypes = {DType::kBF16, DType::kF32};

ModelConfig SixLayers(bool qk_norm) {
  ModelConfig c;
  c.num_layers = 6;
  c.hidden = 64;
  c.q_heads = 4;
  c.kv_heads = 2;
  c.head_dim = 16;
  c.ffn = 160;
  c.vocab = 61;
  c.max_positions = 128;
  c.qk_norm = qk_norm;
  return c;
}

int64_t Size(const ModelConfig& config, const Retention& retention) {
  return Activations::SizeBytes(config, kTypes, kRows, kHeadRows, retention);
}

Retention Choose(const ModelConfig& config, int64_t budget_bytes) {
  return Activations::Choose(config, kTypes, kRows, kHeadRows, budget_bytes);
}

// Every table from the least to the most: n better layers at each level, then the next level.
std::vector<Retention> Ladder(const ModelConfig& config) {
  std::vector<Retention> ladder;
  for (const Retain level : {Retain::kInputs, Retain::kLean, Retain::kProjections}) {
    for (int64_t n = 0; n < config.num_layers; ++n) ladder.emplace_back(level, n);
  }
  ladder.emplace_back(Retain::kAll);
  return ladder;
}

// Not always more: a level's shared buffer goes when its last user gets its own.
TEST(ActivationsTest, ABetterTableNeverTakesLessMemory) {
  for (const bool qk_norm : {false, true}) {
    const ModelConfig config = SixLayers(qk_norm);
    const int64_t least = Size(config, Retain::kInputs);
    EXPECT_GT(least, Size(config, Retain::kNothing));
    int64_t before = least;
    for (const Retention& retention : Ladder(config)) {
      const int64_t bytes = Size(config, retention);
      EXPECT_GE(bytes, before) << retention.ToString(config.num_layers);
      before = bytes;
    }
    EXPECT_GT(before, 2 * least);
  }
}

TEST(ActivationsTest, ChoosesTheBestTableThatFits) {
  for (const bool qk_norm : {false, true}) {
    const ModelConfig config = SixLayers(qk_norm);
    const std::vector<Retention> ladder = Ladder(config);
    const auto best = [&](int64_t budget_bytes) {
      Retention fits = ladder[0];  // with too little for all: the least
      for (const Retention& r : ladder) {
        if (Size(config, r) <= budget_bytes) fits = r;
      }
      return fits;
    };
    for (const Retention& retention : ladder) {
      const int64_t bytes = Size(config, retention);
      EXPECT_EQ(Choose(config, bytes), best(bytes));
      EXPECT_EQ(Choose(config, bytes - 1), best(bytes - 1));
    }
  }
}

TEST(ActivationsTest, NamesTheTable) {
  EXPECT_EQ(Retention(Retain::kAll).ToString(6), "all=6");
  EXPECT_EQ(Retention(Retain::kLean, 2).ToString(6), "projections=2 lean=4");
}

}  // namespace
}  // namespace coppice
