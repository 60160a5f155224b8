#include "kernels/ops/token_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "tests/support/random_batch.h"

namespace coppice::ops {
namespace {

// Two prompts' trees: rows 0-4 hang below context (node 1 below node 0), row 5 stands alone.
TokenBatch Valid() {
  TokenBatch b;
  b.tokens = {1, 2, 3, 4, 5, 6};
  b.positions = {9, 10, 11, 11, 12, 0};
  b.subtree_end = {5, 5, 3, 5, 5, 6};
  b.kv_slots = {0, 1, 2, -1, 4, 5};
  b.block_tokens = 4;
  b.context_nodes = {{-1, 8, 0}, {0, 1, 2}};
  b.context_blocks = {5, 6, 7};
  b.segments = {{0, 5, 1}, {5, 6, -1}};
  b.logit_rows = {2, 4, 5};
  return b;
}

constexpr int64_t kVocab = 10, kBlocks = 8;

TEST(TokenBatchTest, AcceptsAValidBatchAndAnEmptyOne) {
  EXPECT_TRUE(Valid().Validate(kVocab, kBlocks).ok()) << Valid().Validate(kVocab, kBlocks);
  EXPECT_TRUE(TokenBatch().Validate(kVocab, kBlocks).ok());
}

TEST(TokenBatchTest, ContextLengthCountsThePath) {
  EXPECT_EQ(Valid().ContextLength(-1), 0);
  EXPECT_EQ(Valid().ContextLength(0), 8);
  EXPECT_EQ(Valid().ContextLength(1), 9);
}

TEST(TokenBatchTest, AcceptsRandomTrees) {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    std::mt19937_64 random(seed);
    RandomBatchOptions options;
    options.max_context_nodes = seed % 2 == 0 ? 0 : 6;
    const TokenBatch b = RandomBatch(random, options);
    EXPECT_TRUE(b.Validate(options.vocab, options.num_blocks).ok())
        << "seed " << seed << ": " << b.Validate(options.vocab, options.num_blocks);
  }
}

TEST(TokenBatchTest, NamesTheFirstBrokenInvariant) {
  struct Case {
    std::function<void(TokenBatch&)> breakage;
    const char* message;
  };
  const Case cases[] = {
      {[](TokenBatch& b) { b.positions.pop_back(); }, "positions wants 6 entries, got 5"},
      {[](TokenBatch& b) { b.subtree_end.push_back(7); }, "subtree_end wants 6 entries, got 7"},
      {[](TokenBatch& b) { b.kv_slots.pop_back(); }, "kv_slots wants 6 entries, got 5"},
      {[](TokenBatch& b) { b.block_tokens = 0; }, "block_tokens wants a positive number"},
      {[](TokenBatch& b) { b.context_nodes[1].parent = 1; }, "context node 1 wants a parent"},
      {[](TokenBatch& b) { b.context_nodes[0].parent = -2; }, "context node 0 wants a parent"},
      {[](TokenBatch& b) { b.context_nodes[1].num_tokens = 0; }, "at least one token"},
      {[](TokenBatch& b) { b.context_nodes[1].num_tokens = 5; }, "wants blocks [2, 4)"},
      {[](TokenBatch& b) { b.context_nodes[1].block_begin = -1; }, "wants blocks [-1, 0)"},
      {[](TokenBatch& b) { b.context_nodes[0].num_tokens = 7; }, "wants whole blocks of 4"},
      {[](TokenBatch& b) { b.context_blocks[0] = 8; }, "id in [0, 8), got 8"},
      {[](TokenBatch& b) { b.segments[1].row_begin = 4; }, "segment 1 wants to begin at row 5"},
      {[](TokenBatch& b) { b.segments[1].row_end = 5; }, "segment 1 wants to begin at row 5"},
      {[](TokenBatch& b) { b.segments.pop_back(); }, "segments want to cover 6 rows, got 5"},
      {[](TokenBatch& b) { b.segments[0].context_node = 2; }, "segment 0 wants a context node"},
      {[](TokenBatch& b) { b.subtree_end[2] = 2; }, "row 2 wants subtree_end in (2, 5], got 2"},
      {[](TokenBatch& b) { b.subtree_end[4] = 6; }, "row 4 wants subtree_end in (4, 5], got 6"},
      {[](TokenBatch& b) { b.positions[0] = 8; }, "row 0 wants position 9, got 8"},
      {[](TokenBatch& b) { b.positions[3] = 12; }, "row 3 wants position 11, got 12"},
      {[](TokenBatch& b) { b.positions[5] = 1; }, "row 5 wants position 0, got 1"},
      {[](TokenBatch& b) { b.tokens[1] = -1; }, "row 1 wants a token in [0, 10), got -1"},
      {[](TokenBatch& b) { b.tokens[1] = 10; }, "row 1 wants a token in [0, 10), got 10"},
      {[](TokenBatch& b) { b.kv_slots[0] = 32; }, "kv slot wants to lie in 8 blocks"},
      {[](TokenBatch& b) { b.kv_slots[0] = -2; }, "kv slot wants to lie in 8 blocks"},
      {[](TokenBatch& b) {
         b.logit_rows = {2, 2};
       },
       "logit rows want to ascend"},
      {[](TokenBatch& b) { b.logit_rows = {6}; }, "logit rows want to ascend"},
  };
  for (const Case& c : cases) {
    TokenBatch b = Valid();
    c.breakage(b);
    const absl::Status status = b.Validate(kVocab, kBlocks);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(c.message));
  }
}

}  // namespace
}  // namespace coppice::ops
