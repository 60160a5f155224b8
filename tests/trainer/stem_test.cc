// Stems: what the last layer runs for its keys and values alone.
#include "trainer/stem.h"

#include <gtest/gtest.h>

#include "tests/support/tolerances.h"
#include "tests/trainer/trainer_fixture.h"
#include "trainer/prompt_state.h"
#include "trainer/token_tree.h"

namespace coppice {
namespace {

constexpr int64_t kPage = PromptState::kBlockTokens;
constexpr int64_t kVocab = 61;

std::vector<int32_t> Prompt(int64_t tokens, int32_t first = 3) {
  std::vector<int32_t> prompt(tokens, 7);
  prompt[0] = first;
  return prompt;
}

TokenTree Tree(const std::vector<int32_t>& a, const std::vector<int32_t>& b,
               const std::vector<float>& wanted = {}) {
  static const std::vector<int32_t> kOne = {10, 11, 12}, kOther = {20, 21};
  return BuildTokenTree(std::vector<TokenSequence>{
      {.prompt = a, .response = kOne, .wanted = wanted}, {.prompt = b, .response = kOther}});
}

TEST(StemTest, IsThePromptInWholePagesWithoutItsLastToken) {
  for (const int64_t tokens : {kPage + 1, 2 * kPage, 2 * kPage + 1, 3 * kPage - 1}) {
    const TokenTree tree = Tree(Prompt(tokens), Prompt(tokens));
    EXPECT_EQ(StemRows(tree.batch), (tokens - 1) / kPage * kPage);
  }
  EXPECT_EQ(StemRows(Tree(Prompt(kPage), Prompt(kPage)).batch), 0);
}

TEST(StemTest, EndsWhereSequencesPart) {
  EXPECT_EQ(StemRows(Tree(Prompt(2 * kPage), Prompt(2 * kPage, 4)).batch), 0);
  std::vector<int32_t> parts = Prompt(3 * kPage);
  parts[kPage + 1] = 9;
  EXPECT_EQ(StemRows(Tree(Prompt(3 * kPage), parts).batch), kPage);
}

TEST(StemTest, ABatchWithContextOrWithoutLossHasNone) {
  TokenTree tree = Tree(Prompt(2 * kPage), Prompt(2 * kPage));
  ops::TokenBatch silent = tree.batch;
  silent.logit_rows.clear();
  EXPECT_EQ(StemRows(silent), 0);
  HangBelowPrompt(5, tree.batch);
  EXPECT_EQ(StemRows(tree.batch), 0);
}

TEST(StemTest, TheRowsBehindItHangBelowIt) {
  const std::vector<int32_t> prompt = Prompt(2 * kPage + 9);
  const TokenTree tree = Tree(prompt, prompt);
  const ops::TokenBatch behind = BehindStem(tree.batch, StemRows(tree.batch));
  ASSERT_TRUE(behind.Validate(kVocab, 2).ok()) << behind.Validate(kVocab, 2);
  EXPECT_EQ(behind.num_rows(), tree.num_rows() - 2 * kPage);
  EXPECT_EQ(behind.ContextLength(behind.segments[0].context_node), 2 * kPage);
  EXPECT_EQ(behind.positions[0], 2 * kPage);
  EXPECT_EQ(behind.subtree_end[0], behind.num_rows());
}

class StemGradientTest : public testing::TestWithParam<Architecture> {};

// Against separate sequences in one pass, which have no stem in common, and without stems.
TEST_P(StemGradientTest, EqualsSeparateSequencesOnRandomTrees) {
  ModelConfig config = TinyConfig(GetParam(), GetParam() == Architecture::kQwen2);
  config.max_positions = 512;
  TinyPolicy shared(config), separate(config, 1, {.share_prefixes = false});
  TinyPolicy without(config, 1, {.slow_context = true});
  for (uint64_t seed = 0; seed < 10; ++seed) {
    const std::string what = "seed " + std::to_string(seed);
    Random random(seed);
    ForwardBackwardRequest request;
    request.loss = RandomLoss(random);
    TrainGroup group{.prompt = Prompt(Uniform(random, kPage + 1, 3 * kPage))};
    for (int32_t& t : group.prompt) t = static_cast<int32_t>(Uniform(random, 0, kVocab - 1));
    group.samples.push_back(RandomSample(random, {1, 2, 3}));
    const RandomTree tree(random, kVocab, 3);
    for (const std::vector<int32_t>& path : tree.paths()) {
      group.samples.push_back(RandomSample(random, path));
    }
    for (TrainSample& s : group.samples) s.advantages = RandomFloats(random, 1, 0.2f, 1);
    request.groups.push_back(std::move(group));

    const ForwardBackwardResult got = shared.trainer().ForwardBackward(request).value();
    const ForwardBackwardResult want = separate.trainer().ForwardBackward(request).value();
    EXPECT_NEAR(got.loss, want.loss, tolerance::kTreeVersusFlat * (1 + std::abs(want.loss)))
        << what;
    const std::vector<float> gradients = separate.Gradients();
    ExpectTensorsNear(config, shared.Gradients(), {gradients.begin(), gradients.end()},
                      tolerance::kTreeVersusFlat, what);
    ASSERT_TRUE(without.trainer().ForwardBackward(request).ok());
    ExpectTensorsNear(config, without.Gradients(), {gradients.begin(), gradients.end()},
                      tolerance::kTreeVersusFlat, what);
    // The last layer's attention leaves out whole pages of the prompt.
    const int64_t left_out = without.ops().attended_rows() - shared.ops().attended_rows();
    EXPECT_GE(left_out, (static_cast<int64_t>(seed) + 1) * kPage) << what;
    EXPECT_EQ(left_out % kPage, 0) << what;
    for (TinyPolicy* policy : {&shared, &separate, &without}) policy->DropGradients();
    if (testing::Test::HasFailure()) break;
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, StemGradientTest,
                         testing::Values(Architecture::kLlama, Architecture::kQwen2,
                                         Architecture::kQwen3),
                         [](const auto& test) {
                           return ArchitectureName(TinyConfig(test.param, false));
                         });

}  // namespace
}  // namespace coppice
