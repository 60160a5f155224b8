#include "trainer/token_tree.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "tests/trainer/trainer_fixture.h"

namespace coppice {
namespace {

using Tokens = std::vector<int32_t>;

// Owns the tokens that sequences borrow.
struct Pair {
  Tokens prompt;
  Tokens response;
};

std::vector<TokenSequence> Sequences(const std::vector<Pair>& pairs) {
  std::vector<TokenSequence> sequences;
  for (const Pair& p : pairs) sequences.push_back({.prompt = p.prompt, .response = p.response});
  return sequences;
}

std::vector<Pair> RandomPairs(Random& random, int64_t vocab) {
  std::vector<Pair> pairs;
  const RandomTree tree(random, vocab, static_cast<int>(Uniform(random, 1, 5)));
  for (const Tokens& path : tree.paths()) {
    const int64_t cut = Uniform(random, 1, static_cast<int64_t>(path.size()) - 1);
    pairs.push_back({{path.begin(), path.begin() + cut}, {path.begin() + cut, path.end()}});
  }
  std::shuffle(pairs.begin(), pairs.end(), random);
  return pairs;
}

// Tokens that row q sees under the mask, in row order.
Tokens VisibleTokens(const ops::TokenBatch& batch, int32_t q) {
  Tokens visible;
  for (int32_t k = 0; k <= q; ++k) {
    if (q < batch.subtree_end[k]) visible.push_back(batch.tokens[k]);
  }
  return visible;
}

// What the rows of a trie are by definition: the distinct proper prefixes.
std::set<Tokens> DistinctPrefixes(const std::vector<Pair>& pairs) {
  std::set<Tokens> prefixes;
  for (const Pair& p : pairs) {
    Tokens all = p.prompt;
    all.insert(all.end(), p.response.begin(), p.response.end());
    for (size_t n = 1; n < all.size(); ++n) prefixes.insert(Tokens(all.begin(), all.begin() + n));
  }
  return prefixes;
}

TEST(TokenTreeTest, MergesAPromptWithTwoResponses) {
  //  7 8 -+- 1 (2)
  //       +- 3 (4)
  const std::vector<Pair> pairs = {{{7, 8}, {1, 2}}, {{7, 8}, {3, 4}}};
  const TokenTree tree = BuildTokenTree(Sequences(pairs));
  EXPECT_EQ(tree.batch.tokens, (Tokens{7, 8, 1, 3}));
  EXPECT_EQ(tree.batch.positions, (Tokens{0, 1, 2, 2}));
  EXPECT_EQ(tree.batch.subtree_end, (Tokens{4, 4, 3, 4}));
  EXPECT_EQ(tree.batch.logit_rows, (Tokens{1, 2, 3}));
  EXPECT_EQ(tree.target_indptr, (Tokens{0, 2, 3, 4}));
  EXPECT_EQ(tree.targets, (Tokens{1, 3, 2, 4}));
}

TEST(TokenTreeTest, GivesEqualSamplesOneTarget) {
  const std::vector<Pair> pairs = {{{5}, {6, 7}}, {{5}, {6, 7}}, {{5}, {6, 8}}};
  const TokenTree tree = BuildTokenTree(Sequences(pairs));
  EXPECT_EQ(tree.batch.tokens, (Tokens{5, 6}));
  EXPECT_EQ(tree.targets, (Tokens{6, 7, 8}));
  EXPECT_EQ(tree.samples[0][1].target, tree.samples[1][1].target);
}

TEST(TokenTreeTest, SharesTurnsOfOneConversationWhateverTheirGroup) {
  // The second turn's prompt contains the first turn's response.
  const std::vector<Pair> pairs = {{{1, 2}, {3, 4}}, {{1, 2, 3, 4, 5}, {6}}};
  const TokenTree tree = BuildTokenTree(Sequences(pairs));
  EXPECT_EQ(tree.batch.tokens, (Tokens{1, 2, 3, 4, 5}));
  EXPECT_EQ(tree.batch.logit_rows, (Tokens{1, 2, 4}));
}

TEST(TokenTreeTest, SkipsTargetsThatNobodyWants) {
  const Tokens prompt = {1}, response = {2, 3, 4};
  const std::vector<float> mask = {1, 0, 1};
  const std::vector<TokenSequence> sequences = {
      {.prompt = prompt, .response = response, .wanted = mask}};
  const TokenTree tree = BuildTokenTree(sequences);
  EXPECT_EQ(tree.batch.logit_rows, (Tokens{0, 2}));
  EXPECT_EQ(tree.samples[0][1].target, -1);
}

TEST(TokenTreeTest, PacksSequencesApartWithoutSharing) {
  const std::vector<Pair> pairs = {{{7, 8}, {1, 2}}, {{7, 8}, {3}}};
  const TokenTree tree = BuildTokenTree(Sequences(pairs), /*share=*/false);
  EXPECT_EQ(tree.batch.tokens, (Tokens{7, 8, 1, 7, 8}));
  EXPECT_EQ(tree.batch.positions, (Tokens{0, 1, 2, 0, 1}));
  EXPECT_EQ(tree.batch.subtree_end, (Tokens{3, 3, 3, 5, 5}));
}

TEST(TokenTreeTest, HoldsEveryPrefixOnceAndEveryTargetInItsPlaceOnRandomTrees) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    const int64_t vocab = Uniform(random, 2, 5);  // few tokens: many accidental prefixes
    const std::vector<Pair> pairs = RandomPairs(random, vocab);
    const std::vector<TokenSequence> sequences = Sequences(pairs);
    const TokenTree tree = BuildTokenTree(sequences);
    ASSERT_TRUE(tree.batch.Validate(vocab, 0).ok()) << tree.batch.Validate(vocab, 0);

    std::set<Tokens> rows;
    for (int32_t r = 0; r < tree.num_rows(); ++r) rows.insert(VisibleTokens(tree.batch, r));
    ASSERT_EQ(static_cast<int64_t>(rows.size()), tree.num_rows()) << "a prefix occurs twice";
    ASSERT_EQ(rows, DistinctPrefixes(pairs));
    ASSERT_EQ(CountTreeRows(sequences), tree.num_rows());

    std::set<std::pair<int32_t, int32_t>> distinct_targets;
    for (size_t s = 0; s < pairs.size(); ++s) {
      Tokens prefix = pairs[s].prompt;
      for (size_t t = 0; t < pairs[s].response.size(); ++t) {
        const TargetRef ref = tree.samples[s][t];
        const int32_t row = tree.batch.logit_rows[ref.head_row];
        ASSERT_EQ(VisibleTokens(tree.batch, row), prefix);
        ASSERT_EQ(tree.targets[ref.target], pairs[s].response[t]);
        ASSERT_GE(ref.target, tree.target_indptr[ref.head_row]);
        ASSERT_LT(ref.target, tree.target_indptr[ref.head_row + 1]);
        distinct_targets.insert({row, tree.targets[ref.target]});
        prefix.push_back(pairs[s].response[t]);
      }
    }
    ASSERT_EQ(distinct_targets.size(), tree.targets.size());
  }
}

TEST(TokenTreeTest, DoesNotDependOnTheOrderOfSequences) {
  Random random(3);
  std::vector<Pair> pairs = RandomPairs(random, 4);
  const TokenTree first = BuildTokenTree(Sequences(pairs));
  std::shuffle(pairs.begin(), pairs.end(), random);
  const TokenTree second = BuildTokenTree(Sequences(pairs));
  EXPECT_EQ(first.batch.tokens, second.batch.tokens);
  EXPECT_EQ(first.batch.subtree_end, second.batch.subtree_end);
  EXPECT_EQ(first.targets, second.targets);
}

}  // namespace
}  // namespace coppice
