#include "cache/block_pool.h"

#include <memory>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;

TEST(BlockPoolTest, BlocksMoveBetweenFreeOwnedAndTree) {
  BlockPool pool(4);
  BlockSet set = pool.Take(3);
  EXPECT_EQ(pool.num_free(), 1);
  EXPECT_EQ(pool.num_owned(), 3);
  const std::vector<BlockId> in_tree = pool.Adopt(set.TakeFront(2));
  EXPECT_EQ(pool.num_owned(), 1);
  EXPECT_EQ(pool.num_in_tree(), 2);
  EXPECT_TRUE(pool.InTree(in_tree[0]));
  pool.Free(in_tree.data(), 2);
  EXPECT_EQ(pool.num_free(), 3);
  EXPECT_FALSE(pool.InTree(in_tree[0]));
}

TEST(BlockPoolTest, ASetReturnsItsBlocksWhenItDies) {
  BlockPool pool(2);
  { const BlockSet set = pool.Take(2); }
  EXPECT_EQ(pool.num_free(), 2);
}

TEST(BlockPoolTest, SetsMoveAppendAndSplitInOrder) {
  BlockPool pool(4);
  BlockSet a = pool.Take(2), b = pool.Take(2);
  const BlockId first = a.ids()[0];
  a.Append(std::move(b));
  a.Append(BlockSet());
  EXPECT_THAT(a.ids(), ElementsAre(BlockId{0}, BlockId{1}, BlockId{2}, BlockId{3}));
  BlockSet front = a.TakeFront(1);
  EXPECT_THAT(front.ids(), ElementsAre(first));
  front = std::move(a);  // returns block 0
  EXPECT_EQ(pool.num_free(), 1);
  BlockSet* alias = &front;
  front = std::move(*alias);
  EXPECT_EQ(front.size(), 3);
  BlockSet moved(std::move(front));
  EXPECT_EQ(moved.size(), 3);
  EXPECT_EQ(front.size(), 0);  // NOLINT(bugprone-use-after-move)
}

TEST(BlockPoolTest, TheBlockFreedLastIsTakenFirst) {
  BlockPool pool(3);
  const BlockSet a = pool.Take(1);
  BlockSet b = pool.Take(1);
  const BlockId last = b.ids()[0];
  b = BlockSet();
  EXPECT_EQ(pool.Take(1).ids()[0], last);
}

TEST(BlockPoolDeathTest, DoubleFreeAndLostSetsAreCaught) {
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  BlockPool pool(2);
  const std::vector<BlockId> ids = pool.Adopt(pool.Take(1));
  pool.Free(ids.data(), 1);
  EXPECT_DEATH(pool.Free(ids.data(), 1), "block 0");
  EXPECT_DEATH(pool.Take(3), "CHECK failed");
  EXPECT_DEATH(
      {
        auto lost = std::make_unique<BlockPool>(2);
        const BlockSet set = lost->Take(1);
        lost.reset();
      },
      "a BlockSet outlives its pool");
}

}  // namespace
}  // namespace coppice
