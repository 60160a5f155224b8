#include "trainer/gradient_arena.h"

#include <gtest/gtest.h>

#include "kernels/ops/ops.h"
#include "tests/trainer/trainer_fixture.h"

namespace coppice {
namespace {

GradientArena Create(const ModelConfig& config, DType matrices, ops::Ops& ops) {
  return std::move(GradientArena::Create(config, matrices, ops)).value();
}

int64_t NumBytes(const GradientArena& arena) {
  int64_t bytes = 0;
  for (const GradientArena::Slice& s : arena.slices()) bytes += s.values.num_bytes();
  return bytes;
}

TEST(GradientArenaTest, SlicesCoverTheArenaOfWeightsInOrder) {
  const auto ops = std::move(ops::CreateOps("cpu", 1)).value();
  for (const Architecture a : {Architecture::kLlama, Architecture::kQwen2, Architecture::kQwen3}) {
    const ModelConfig config = TinyConfig(a, a == Architecture::kQwen2);
    for (const DType matrices : {DType::kF32, DType::kBF16}) {
      const GradientArena arena = Create(config, matrices, *ops);
      int64_t end = 0;
      for (const GradientArena::Slice& s : arena.slices()) {
        EXPECT_EQ(s.begin, end);
        EXPECT_EQ(s.begin % 64, 0);
        end += s.values.dim(0);
      }
      EXPECT_EQ(end, NumParameterElements(config));
      EXPECT_EQ(NumBytes(arena), GradientArena::SizeBytes(config, matrices));
      EXPECT_EQ(arena.parameters().flat.present(), matrices == DType::kF32);
    }
  }
}

TEST(GradientArenaTest, OnlyMatricesOfLayersAreBf16) {
  const auto ops = std::move(ops::CreateOps("cpu", 1)).value();
  const ModelConfig config = TinyConfig(Architecture::kQwen3, false);
  const GradientArena arena = Create(config, DType::kBF16, *ops);
  const Parameters& p = arena.parameters();
  for (const TensorView& t : {p.embedding, p.final_norm, p.head}) EXPECT_EQ(t.dtype, DType::kF32);
  for (const LayerParameters& l : p.layers) {
    for (const TensorView& t : {l.attn_norm, l.q_norm, l.k_norm, l.mlp_norm}) {
      EXPECT_EQ(t.dtype, DType::kF32);
    }
    for (const TensorView& t : {l.qkv, l.o, l.gate_up, l.down}) EXPECT_EQ(t.dtype, DType::kBF16);
  }
  const GradientArena tied = Create(TinyConfig(Architecture::kQwen2, true), DType::kBF16, *ops);
  EXPECT_EQ(tied.parameters().head.data, tied.parameters().embedding.data);
}

}  // namespace
}  // namespace coppice
