// CheckNode finds every kind of damage. A healthy tree of two nodes, hurt in one way at a time.
#include "cache/radix_check.h"

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace coppice {
namespace {

using ::testing::HasSubstr;

class RadixCheckTest : public ::testing::Test {
 protected:
  RadixCheckTest() : pool_(4) {
    tree_.root = std::make_unique<RadixNode>();
    tree_.root->tree = &tree_;
    tree_.root->block_tokens = 2;
    parent_ = Add(tree_.root.get(), {1, 2});
    child_ = Add(parent_, {3, 4});
    evictable_.Add(child_);
  }
  RadixNode* Add(RadixNode* parent, const std::vector<int32_t>& tokens) {
    auto node = std::make_unique<RadixNode>();
    RadixNode* added = node.get();
    node->tree = &tree_;
    node->serial = parent->serial + 1;
    node->parent = parent;
    node->block_tokens = 2;
    node->first_block = parent->end_block();
    node->Append(tokens, pool_.Adopt(pool_.Take(1)));
    node->committed = 1;
    parent->AddChild(std::move(node), /*is_twin=*/false);
    return added;
  }
  absl::Status Check(const RadixNode& node) { return CheckNode(node, pool_, evictable_); }

  BlockPool pool_;
  RadixTree tree_;
  EvictionOrder evictable_;
  RadixNode* parent_;
  RadixNode* child_;
};

TEST_F(RadixCheckTest, HealthyNodesPass) {
  EXPECT_EQ(Check(*parent_), absl::OkStatus());
  EXPECT_EQ(Check(*child_), absl::OkStatus());
}

TEST_F(RadixCheckTest, EveryKindOfDamageIsNamed) {
  RadixTree other;
  const struct {
    const char* want;
    std::function<void()> hurt;
  } cases[] = {
      {"tokens and blocks differ in length", [&] { child_->tokens.push_back(5); }},
      {"fingerprints and blocks differ", [&] { child_->fingerprints.clear(); }},
      {"in flight without a lease", [&] { child_->committed = 0; }},
      {"private without a lease", [&] { child_->is_private = true; }},
      {"another tree", [&] { child_->tree = &other; }},
      {"does not start where its parent ends", [&] { child_->first_block = 0; }},
      {"committed below a parent that is not", [&] { parent_->committed = 0; }},
      {"shared below a private parent", [&] { parent_->is_private = true; }},
      {"outlives its parent", [&] { parent_->expires_at = absl::Seconds(1); }},
      {"wrong fingerprint", [&] { child_->fingerprints[0] ^= 1; }},
      {"holds a block that is not the tree's", [&] { pool_.Free(child_->blocks.data(), 1); }},
      {"has no blocks", [&] { child_->blocks.clear(); }},
  };
  for (const auto& c : cases) {
    const auto saved = [](const RadixNode& n) {
      return std::make_tuple(n.tree, n.first_block, n.tokens, n.blocks, n.fingerprints, n.committed,
                             n.is_private, n.expires_at);
    };
    const auto parent = saved(*parent_), child = saved(*child_);
    c.hurt();
    EXPECT_THAT(std::string(Check(*child_).message()), HasSubstr(c.want));
    const auto heal = [](RadixNode& n, const auto& from) {
      std::tie(n.tree, n.first_block, n.tokens, n.blocks, n.fingerprints, n.committed, n.is_private,
               n.expires_at) = from;
    };
    heal(*parent_, parent);
    heal(*child_, child);
  }
}

TEST_F(RadixCheckTest, LeasesAndListingAreCompared) {
  evictable_.Remove(child_);
  EXPECT_THAT(std::string(Check(*child_).message()), HasSubstr("listed"));
  child_->num_leases = 1;
  EXPECT_EQ(Check(*child_), absl::OkStatus());
  EXPECT_THAT(std::string(Check(*parent_).message()), HasSubstr("fewer leases than its children"));
}

TEST_F(RadixCheckTest, TotalsNameWhatDiffers) {
  TreeTotals sum{.namespaces = 1};
  sum.Add(*parent_);
  sum.Add(*child_);
  const TreeTotals want{.namespaces = 1,
                        .nodes = 2,
                        .evictable_leaves = 1,
                        .blocks = 2,
                        .leased_blocks = 0,
                        .cached_only_blocks = 2};
  EXPECT_EQ(CheckTotals(want, sum), absl::OkStatus());
  sum.nodes = 3;
  EXPECT_THAT(std::string(CheckTotals(want, sum).message()), HasSubstr("nodes: want 2, have 3"));
}

}  // namespace
}  // namespace coppice
