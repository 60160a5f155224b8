#include "server/engine/batch_builder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace coppice {
namespace {

using ::testing::ElementsAre;

std::vector<BlockId> Blocks(std::initializer_list<int> ids) {
  std::vector<BlockId> blocks;
  for (int id : ids) blocks.push_back(BlockId{id});
  return blocks;
}

// The block ids on the path of a context node, from the root.
std::vector<int32_t> ContextBlocks(const ops::TokenBatch& batch, int32_t node) {
  std::vector<int32_t> blocks;
  for (; node >= 0; node = batch.context_nodes[node].parent) {
    const ops::ContextNode& n = batch.context_nodes[node];
    const int32_t count = (n.num_tokens + batch.block_tokens - 1) / batch.block_tokens;
    blocks.insert(blocks.begin(), &batch.context_blocks[n.block_begin],
                  &batch.context_blocks[n.block_begin] + count);
  }
  return blocks;
}

TEST(BuildTokenBatchTest, SamplesOfAGroupShareThePromptsNode) {
  const std::vector<SegmentSpec> specs = {{.blocks = Blocks({5, 6, 1}),
                                           .context_tokens = 10,
                                           .tokens = {7},
                                           .stored_tokens = 10,
                                           .wants_logits = true},
                                          {.blocks = Blocks({5, 6, 2}),
                                           .context_tokens = 9,
                                           .tokens = {8},
                                           .stored_tokens = 9,
                                           .wants_logits = true}};
  const ops::TokenBatch batch = BuildTokenBatch(specs, 4);
  EXPECT_TRUE(batch.Validate(100, 10).ok()) << batch.Validate(100, 10);
  ASSERT_EQ(batch.context_nodes.size(), 3u);  // the prompt, and a partial block for each
  EXPECT_EQ(batch.context_nodes[0].num_tokens, 8);
  EXPECT_EQ(batch.context_nodes[1].parent, 0);
  EXPECT_EQ(batch.context_nodes[2].parent, 0);
  EXPECT_THAT(batch.positions, ElementsAre(10, 9));
  EXPECT_THAT(batch.kv_slots, ElementsAre(1 * 4 + 2, 2 * 4 + 1));
  EXPECT_THAT(batch.logit_rows, ElementsAre(0, 1));
}

TEST(BuildTokenBatchTest, RowsWhoseKvExistsAreNotStored) {
  const ops::TokenBatch batch = BuildTokenBatch({{.blocks = Blocks({3, 4}),
                                                  .context_tokens = 7,
                                                  .tokens = {1},
                                                  .stored_tokens = 8,
                                                  .wants_logits = true}},
                                                4);
  EXPECT_TRUE(batch.Validate(100, 10).ok());
  EXPECT_THAT(batch.kv_slots, ElementsAre(-1));
  EXPECT_THAT(batch.context_blocks, ElementsAre(3, 4));
}

TEST(BuildTokenBatchTest, APromptFromItsStartHasNoContext) {
  const ops::TokenBatch batch =
      BuildTokenBatch({{.blocks = Blocks({3, 4}), .tokens = {1, 2, 3, 4, 5}}}, 4);
  EXPECT_TRUE(batch.Validate(100, 10).ok());
  EXPECT_TRUE(batch.context_nodes.empty());
  EXPECT_THAT(batch.subtree_end, ElementsAre(5, 5, 5, 5, 5));
  EXPECT_TRUE(batch.logit_rows.empty());
}

// Random block tables that share prefixes: every segment sees exactly its own blocks, and no block
// is listed twice for the same run of a shared prefix.
TEST(BuildTokenBatchTest, EverySegmentSeesItsOwnPath) {
  constexpr uint64_t kSeed = 3;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (int round = 0; round < 200; ++round) {
    const int64_t block_tokens = 1 + static_cast<int64_t>(random() % 5);
    std::vector<SegmentSpec> specs;
    int32_t next_block = 0;
    for (int s = 0; s < 12; ++s) {
      SegmentSpec spec;
      if (!specs.empty() && random() % 3 != 0) {
        const SegmentSpec& other = specs[random() % specs.size()];
        const size_t whole = other.context_tokens / block_tokens;
        spec.blocks.assign(other.blocks.begin(), other.blocks.begin() + random() % (whole + 1));
      }
      for (uint64_t i = random() % 4 + 2; i > 0; --i) spec.blocks.push_back(BlockId{next_block++});
      const int64_t capacity = static_cast<int64_t>(spec.blocks.size()) * block_tokens;
      spec.context_tokens = static_cast<int64_t>(random() % capacity);
      spec.stored_tokens = spec.context_tokens;
      spec.tokens.assign(1 + random() % (capacity - spec.context_tokens), 1);
      spec.wants_logits = random() % 2 == 0;
      specs.push_back(std::move(spec));
    }
    const ops::TokenBatch batch = BuildTokenBatch(specs, block_tokens);
    ASSERT_TRUE(batch.Validate(10, next_block).ok()) << batch.Validate(10, next_block);
    ASSERT_EQ(batch.segments.size(), specs.size());
    for (size_t s = 0; s < specs.size(); ++s) {
      const int32_t node = batch.segments[s].context_node;
      EXPECT_EQ(batch.ContextLength(node), specs[s].context_tokens);
      const int64_t count = (specs[s].context_tokens + block_tokens - 1) / block_tokens;
      const std::vector<int32_t> seen = ContextBlocks(batch, node);
      ASSERT_EQ(static_cast<int64_t>(seen.size()), count);
      for (int64_t i = 0; i < count; ++i) EXPECT_EQ(seen[i], Raw(specs[s].blocks[i]));
    }
  }
}

}  // namespace
}  // namespace coppice
