// Prompts that run apart from their branches. A group too large for one pass runs depth-first: its
// prompt once, its branches in micro-batches; a prompt that generation has kept is not run forward
// at all. Gradients and results equal those of the whole tree.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>

#include "tests/support/kept_prompt.h"
#include "tests/support/tolerances.h"
#include "tests/trainer/trainer_fixture.h"
#include "trainer/activations.h"
#include "trainer/prompt_state.h"

namespace coppice {
namespace {

std::vector<double> ToDouble(const std::vector<float>& v) { return {v.begin(), v.end()}; }

std::vector<int32_t> RandomTokens(Random& random, int64_t n, int64_t vocab) {
  std::vector<int32_t> tokens(n);
  for (int32_t& t : tokens) t = static_cast<int32_t>(Uniform(random, 0, vocab - 1));
  return tokens;
}

// One group whose responses are the paths of random trees, so that they share nested prefixes
// beyond the prompt; one response is a single token, which has no rows of its own.
ForwardBackwardRequest OneGroup(Random& random, int64_t vocab, int64_t prompt_tokens) {
  ForwardBackwardRequest request;
  request.loss = RandomLoss(random);
  TrainGroup group{.prompt = RandomTokens(random, prompt_tokens, vocab)};
  group.samples.push_back(RandomSample(random, RandomTokens(random, 1, vocab)));
  for (int i = 0; i < 3; ++i) {
    const RandomTree tree(random, vocab, 4);
    for (const std::vector<int32_t>& path : tree.paths()) {
      group.samples.push_back(RandomSample(random, path));
    }
  }
  for (TrainSample& sample : group.samples) {
    const size_t n = Uniform(random, 0, 1) == 0 ? 1 : sample.tokens.size();
    sample.advantages = RandomFloats(random, n, 0.2f, 1);
  }
  request.groups.push_back(std::move(group));
  return request;
}

int64_t LongestResponse(const ForwardBackwardRequest& request) {
  size_t longest = 0;
  for (const TrainGroup& group : request.groups) {
    for (const TrainSample& s : group.samples) longest = std::max(longest, s.tokens.size());
  }
  return static_cast<int64_t>(longest);
}

void ExpectSameResults(const ForwardBackwardResult& got, const ForwardBackwardResult& want,
                       const std::string& what) {
  EXPECT_NEAR(got.loss, want.loss, tolerance::kTreeVersusFlat * (1 + std::abs(want.loss))) << what;
  EXPECT_EQ(got.tokens.flat, want.tokens.flat) << what;
  EXPECT_EQ(got.tokens.with_loss, want.tokens.with_loss) << what;
  for (size_t s = 0; s < want.samples.size(); ++s) {
    ASSERT_EQ(got.samples[s].logprobs.size(), want.samples[s].logprobs.size()) << what;
    EXPECT_NEAR(got.samples[s].entropy, want.samples[s].entropy, 10 * tolerance::kTreeVersusFlat);
    for (size_t t = 0; t < want.samples[s].logprobs.size(); ++t) {
      EXPECT_NEAR(got.samples[s].logprobs[t], want.samples[s].logprobs[t],
                  10 * tolerance::kTreeVersusFlat)
          << what << ", sample " << s << ", token " << t;
    }
  }
}

// With room for prompts of more than one block of the state.
ModelConfig LongConfig(Architecture architecture, bool tied_head) {
  ModelConfig config = TinyConfig(architecture, tied_head);
  config.max_positions = 256;
  return config;
}

class BranchGradientTest : public testing::TestWithParam<ModelConfig> {};

TEST_P(BranchGradientTest, EqualsTheWholeTreeOnRandomTrees) {
  int64_t num_cut = 0;
  TinyPolicy whole(GetParam());
  for (uint64_t seed = 0; seed < 40; ++seed) {
    const std::string what = "seed " + std::to_string(seed);
    Random random(seed);
    // Prompts of one token up to more than one block of the state.
    const int64_t kind = Uniform(random, 0, 3);
    const int64_t prompt = kind == 0   ? Uniform(random, 1, 3)
                           : kind == 1 ? Uniform(random, 129, 180)
                                       : Uniform(random, 4, 60);
    ForwardBackwardRequest request = OneGroup(random, whole.config().vocab, prompt);
    request.return_logprobs = Uniform(random, 0, 3) != 0;
    const int64_t rows = std::max(prompt, LongestResponse(request) + Uniform(random, 0, 8));
    TinyPolicy cut(GetParam(), 1, {.max_rows = rows});

    const ForwardBackwardResult want = whole.trainer().ForwardBackward(request).value();
    const absl::StatusOr<ForwardBackwardResult> got = cut.trainer().ForwardBackward(request);
    ASSERT_TRUE(got.ok()) << got.status() << what;
    ExpectSameResults(*got, want, what);
    ExpectTensorsNear(whole.config(), cut.Gradients(), ToDouble(whole.Gradients()),
                      tolerance::kTreeVersusFlat, what);
    EXPECT_EQ(got->metrics.at("passes"), 1) << what;
    if (got->metrics.at("micro_batches") > 1) ++num_cut;
    whole.DropGradients();
    if (testing::Test::HasFailure()) break;
  }
  EXPECT_GE(num_cut, 20);
}

// ---- Prompts kept by generation

// The state of `prompt` as a prefill in pieces leaves it.
std::shared_ptr<KeptPrompt> Keep(TinyPolicy& policy, const std::vector<int32_t>& prompt,
                                 int64_t piece) {
  std::shared_ptr<KeptPrompt> kept = KeepPrompt(policy.decoder(), policy.model().params, prompt,
                                                policy.trainer().policy_version(), piece)
                                         .value();
  EXPECT_TRUE(kept->complete());
  return kept;
}

TEST_P(BranchGradientTest, KeptPromptsGiveTheSameGradientsWithoutTheirForward) {
  TinyPolicy whole(GetParam()), reusing(GetParam());
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const std::string what = "seed " + std::to_string(seed);
    Random random(seed);
    const int64_t prompt = Uniform(random, 1, 180);
    ForwardBackwardRequest request = OneGroup(random, whole.config().vocab, prompt);
    const ForwardBackwardResult want = whole.trainer().ForwardBackward(request).value();
    request.groups[0].kept_prompt =
        Keep(reusing, request.groups[0].prompt, Uniform(random, 1, prompt));
    const ForwardBackwardResult got = reusing.trainer().ForwardBackward(request).value();
    EXPECT_EQ(got.tokens.prompt_forward_skipped, prompt) << what;
    EXPECT_EQ(got.tokens.unique, want.tokens.unique) << what;
    ExpectSameResults(got, want, what);
    ExpectTensorsNear(whole.config(), reusing.Gradients(), ToDouble(whole.Gradients()),
                      tolerance::kTreeVersusFlat, what);
    whole.DropGradients();
    reusing.DropGradients();
    if (testing::Test::HasFailure()) break;
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, BranchGradientTest,
                         testing::Values(LongConfig(Architecture::kLlama, false),
                                         LongConfig(Architecture::kQwen2, true),
                                         LongConfig(Architecture::kQwen3, false)),
                         [](const auto& test) { return ArchitectureName(test.param); });

// 20 prompt tokens, eight responses of nine that part at once.
ForwardBackwardRequest WideRequest() {
  ForwardBackwardRequest request;
  request.groups = {{.prompt = std::vector<int32_t>(20, 3)}};
  for (int32_t i = 0; i < 8; ++i) {
    request.groups[0].samples.push_back(
        {.tokens = {10 + i, 1, 2, 3, 4, 5, 6, 7, 8}, .advantages = {1.0f - 0.3f * i}});
  }
  return request;
}

TEST(BranchTest, RunsThePromptOnce) {
  TinyPolicy policy(TinyConfig(Architecture::kQwen3, true), 1, {.max_rows = 24});
  const ForwardBackwardResult result = policy.trainer().ForwardBackward(WideRequest()).value();
  EXPECT_EQ(result.metrics.at("micro_batches"), 3);  // of three, three and two samples
  EXPECT_EQ(result.tokens.unique, 20 + 8 * 8);       // as many as the whole tree has
  EXPECT_EQ(result.tokens.flat, 8 * 28);
}

TEST(BranchTest, FitsTheBudgetOfActivations) {
  const ModelConfig config = TinyConfig(Architecture::kQwen3, true);
  const int64_t whole =
      Activations::SizeBytes(config, ops::ActivationTypes(), 84, 65, Retain::kInputs);
  const int64_t kept = PromptState::SizeBytes(config, ops::ActivationTypes(), 20) +
                       PromptGradients::SizeBytes(config, 20);
  const int64_t budget = kept + whole / 2;
  ASSERT_LT(budget, whole);
  TinyPolicy policy(config, 1, {.activation_bytes = budget});
  const ForwardBackwardResult result = policy.trainer().ForwardBackward(WideRequest()).value();
  EXPECT_GT(result.metrics.at("micro_batches"), 1);
  EXPECT_LE(result.metrics.at("activation_bytes"), static_cast<double>(budget));
}

// The prompt retains what the budget has room for, from its state alone to everything.
TEST(BranchTest, WhateverThePromptRetainsTheBitsAreTheSame) {
  ModelConfig config = LongConfig(Architecture::kQwen3, true);
  config.num_layers = 4;
  const ops::ActivationTypes types;
  ForwardBackwardRequest request = WideRequest();
  request.groups[0].prompt.assign(150, 3);
  TinyPolicy all(config, 1, {.max_rows = 150});
  request.groups[0].samples.resize(4);
  for (TrainSample& s : request.groups[0].samples) s.tokens.resize(80, 5);
  const ForwardBackwardResult want = all.trainer().ForwardBackward(request).value();
  EXPECT_EQ(want.metrics.at("micro_batches"), 4);
  EXPECT_EQ(want.metrics.at("recompute"), 0);

  const int64_t least = PromptState::SizeBytes(config, types, 150) +
                        PromptGradients::SizeBytes(config, 150) +
                        Activations::SizeBytes(config, types, 150, 150, Retain::kInputs);
  const int64_t most = static_cast<int64_t>(want.metrics.at("activation_bytes"));
  ASSERT_LT(least, most);
  std::set<double> levels;
  constexpr int kSteps = 12;
  for (int i = 0; i <= kSteps; ++i) {
    const int64_t budget = least + (most - least) * i / kSteps;
    TinyPolicy some(config, 1, {.max_rows = 150, .activation_bytes = budget});
    const auto got = some.trainer().ForwardBackward(request);
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(got->metrics.at("micro_batches"), 4);
    EXPECT_LE(got->metrics.at("activation_bytes"), budget);
    EXPECT_EQ(some.Gradients(), all.Gradients()) << "budget " << budget;
    levels.insert(got->metrics.at("recompute"));
  }
  EXPECT_GE(levels.size(), 3u);
}

// Memory for a part of the request, and rows enough that products again cost more than weights
// again.
TEST(BranchTest, CutsWhatItWouldRecompute) {
  ModelConfig config = LongConfig(Architecture::kQwen3, true);
  config.max_positions = 1024;
  config.num_layers = 6;
  const auto run = [&](int32_t tokens, double fraction, bool slow_context = false) {
    ForwardBackwardRequest request = WideRequest();
    request.groups[0].prompt.assign(200, 3);
    for (TrainSample& s : request.groups[0].samples) s.tokens.resize(tokens, 5);
    TinyPolicy whole(config);
    const ForwardBackwardResult want = whole.trainer().ForwardBackward(request).value();
    EXPECT_EQ(want.metrics.at("micro_batches"), 1);
    const double budget = fraction * want.metrics.at("activation_bytes");
    TinyPolicy some(
        config, 1,
        {.activation_bytes = static_cast<int64_t>(budget), .slow_context = slow_context});
    const ForwardBackwardResult got = some.trainer().ForwardBackward(request).value();
    ExpectSameResults(got, want, "cut");
    ExpectTensorsNear(config, some.Gradients(), ToDouble(whole.Gradients()),
                      tolerance::kTreeVersusFlat, "cut");
    const std::vector<SampleResult> scored = some.trainer().Score(request.groups, 1).value();
    for (size_t s = 0; s < scored.size(); ++s) {
      EXPECT_EQ(scored[s].logprobs, got.samples[s].logprobs);
    }
    return got.metrics;
  };
  const auto few = run(20, 0.7);
  EXPECT_EQ(few.at("micro_batches"), 1);
  EXPECT_GE(few.at("recompute"), 2);
  const auto many = run(300, 0.7);
  EXPECT_GT(many.at("micro_batches"), 1);
  EXPECT_LE(many.at("recompute"), 1);
  const auto slow = run(300, 0.7, /*slow_context=*/true);
  EXPECT_EQ(slow.at("micro_batches"), 1);
  EXPECT_GE(slow.at("recompute"), 2);
}

// A prompt of 200 tokens and eight responses that part at once.
TrainGroup LargeGroup(int32_t first, int32_t tokens) {
  TrainGroup group = WideRequest().groups[0];
  group.prompt.assign(200, first);
  for (TrainSample& s : group.samples) s.tokens.resize(tokens, 5);
  return group;
}

// Metrics of the request within seven tenths of the memory that it would use.
std::map<std::string, double> RunWithinLess(const ForwardBackwardRequest& request,
                                            int64_t max_rows) {
  ModelConfig config = LongConfig(Architecture::kQwen3, true);
  config.max_positions = 2048;
  config.num_layers = 6;
  TinyPolicy all(config, 1, {.max_rows = max_rows});
  const ForwardBackwardResult want = all.trainer().ForwardBackward(request).value();
  EXPECT_EQ(want.metrics.at("recompute"), 0);
  const auto budget = static_cast<int64_t>(0.7 * want.metrics.at("activation_bytes"));
  TinyPolicy some(config, 1, {.max_rows = max_rows, .activation_bytes = budget});
  const ForwardBackwardResult got = some.trainer().ForwardBackward(request).value();
  ExpectSameResults(got, want, "cut");
  ExpectTensorsNear(config, some.Gradients(), ToDouble(all.Gradients()), tolerance::kTreeVersusFlat,
                    "cut");
  return got.metrics;
}

TEST(BranchTest, CutsBesideAGroupThatCannotBeCut) {
  ForwardBackwardRequest request;
  request.groups = {LargeGroup(3, 150), {.prompt = {7}}};
  request.groups[1].samples = {{.tokens = std::vector<int32_t>(1900, 4), .advantages = {1}}};
  const auto metrics = RunWithinLess(request, 4096);
  EXPECT_GT(metrics.at("micro_batches"), 1);
  EXPECT_LE(metrics.at("recompute"), 1);
}

TEST(BranchTest, CutsEachOfManyPasses) {
  ForwardBackwardRequest request;
  for (int32_t first = 20; first < 29; ++first) request.groups.push_back(LargeGroup(first, 100));
  const auto metrics = RunWithinLess(request, 1000);
  EXPECT_EQ(metrics.at("passes"), 9);
  EXPECT_GT(metrics.at("micro_batches"), 9);
  EXPECT_LE(metrics.at("recompute"), 1);
}

TEST(BranchTest, CutsBesideALongPromptOfAnotherPass) {
  ForwardBackwardRequest request;
  request.groups = {LargeGroup(3, 100), {.prompt = std::vector<int32_t>(980, 7)}};
  request.groups[1].samples = {{.tokens = {4, 4, 4}, .advantages = {1}}};
  const auto metrics = RunWithinLess(request, 1000);
  EXPECT_EQ(metrics.at("passes"), 2);
  EXPECT_GT(metrics.at("micro_batches"), 2);
  EXPECT_LE(metrics.at("recompute"), 1);
}

// That one does not fit a pass, and its responses are longer than the other's parts.
TEST(BranchTest, CutsBesideAGroupOfLongResponses) {
  ForwardBackwardRequest request;
  request.groups = {LargeGroup(3, 100), {.prompt = {7}}};
  request.groups[1].samples = {{.tokens = std::vector<int32_t>(600, 4), .advantages = {1}},
                               {.tokens = std::vector<int32_t>(600, 5), .advantages = {-1}}};
  const auto metrics = RunWithinLess(request, 1000);
  EXPECT_EQ(metrics.at("passes"), 2);
  EXPECT_GT(metrics.at("micro_batches"), 3);
  EXPECT_LE(metrics.at("recompute"), 1);
}

// Its response is longer than the parts that the other group is cut into.
TEST(BranchTest, UsesAKeptPromptBesideAGroupThatIsCut) {
  ModelConfig config = LongConfig(Architecture::kQwen3, true);
  config.max_positions = 2048;
  config.num_layers = 6;
  ForwardBackwardRequest request;
  request.groups = {{.prompt = std::vector<int32_t>(200, 9)}, LargeGroup(3, 100)};
  request.groups[0].samples = {{.tokens = std::vector<int32_t>(300, 4), .advantages = {1}}};
  TinyPolicy all(config, 1, {.max_rows = 1000});
  const ForwardBackwardResult want = all.trainer().ForwardBackward(request).value();
  for (const double fraction : {0.6, 0.5}) {
    const auto budget = static_cast<int64_t>(fraction * want.metrics.at("activation_bytes"));
    TinyPolicy some(config, 1, {.max_rows = 1000, .activation_bytes = budget});
    request.groups[0].kept_prompt = Keep(some, request.groups[0].prompt, 64);
    const ForwardBackwardResult got = some.trainer().ForwardBackward(request).value();
    EXPECT_GT(got.metrics.at("micro_batches"), 2);
    EXPECT_EQ(got.tokens.prompt_forward_skipped, 200) << fraction;
    ExpectSameResults(got, want, "kept");
    ExpectTensorsNear(config, some.Gradients(), ToDouble(all.Gradients()),
                      tolerance::kTreeVersusFlat, "kept");
  }
}

// Whole trees, cut groups and kept prompts take turns within one budget, which the device enforces.
TEST(BranchTest, NeverHoldsMoreThanTheBudget) {
  const ModelConfig config = TinyConfig(Architecture::kQwen3, true);
  const int64_t held = PromptState::SizeBytes(config, ops::ActivationTypes(), 20) +
                       PromptGradients::SizeBytes(config, 20);
  const int64_t budget =
      held + Activations::SizeBytes(config, ops::ActivationTypes(), 84, 65, Retain::kInputs) / 2;
  const ForwardBackwardRequest wide = WideRequest();  // too large for one pass
  ForwardBackwardRequest small = wide;
  small.groups[0].samples.resize(2);
  ForwardBackwardRequest both = wide;
  both.groups.push_back(small.groups[0]);
  both.groups[1].prompt.assign(20, 4);

  for (const std::vector<ForwardBackwardRequest>& order :
       {std::vector{small, wide, small}, {wide, small, wide}, {both, small, wide}}) {
    TinyPolicy policy(config, 1, {.activation_bytes = budget});
    ForwardBackwardRequest kept = wide;
    kept.groups[0].kept_prompt = Keep(policy, wide.groups[0].prompt, 20);
    policy.ops().LimitAllocations(budget + NumParameterElements(config) * SizeOf(DType::kF32));
    int64_t most = 0;
    for (const ForwardBackwardRequest& request : order) {
      const auto result = policy.trainer().ForwardBackward(request);
      ASSERT_TRUE(result.ok()) << result.status();
      most = std::max(most, static_cast<int64_t>(result->metrics.at("activation_bytes")));
      ASSERT_TRUE(policy.trainer().Score(request.groups, 1).ok());
    }
    EXPECT_GT(most, budget - held);  // what a prompt keeps would not fit beside it
    const auto result = policy.trainer().ForwardBackward(kept);
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->tokens.prompt_forward_skipped, 20);
  }
}

TEST(BranchTest, MixesWithGroupsThatFit) {
  ForwardBackwardRequest request = WideRequest();
  for (const int32_t first : {40, 50}) {
    request.groups.push_back(
        {.prompt = {first, 2, 3}, .samples = {{.tokens = {4, 5}, .advantages = {1}}}});
  }
  std::swap(request.groups[0], request.groups[1]);
  const ModelConfig config = TinyConfig(Architecture::kLlama, true);
  TinyPolicy whole(config), cut(config, 1, {.max_rows = 24});
  const ForwardBackwardResult want = whole.trainer().ForwardBackward(request).value();
  const ForwardBackwardResult got = cut.trainer().ForwardBackward(request).value();
  EXPECT_EQ(got.metrics.at("passes"), 2);
  ExpectSameResults(got, want, "mixed");
  ExpectTensorsNear(config, cut.Gradients(), ToDouble(whole.Gradients()),
                    tolerance::kTreeVersusFlat, "mixed");
}

TEST(BranchTest, ScoresWithTheLogprobsOfTraining) {
  TinyPolicy policy(TinyConfig(Architecture::kQwen3, true), 1, {.max_rows = 24});
  const ForwardBackwardRequest request = WideRequest();
  const ForwardBackwardResult trained = policy.trainer().ForwardBackward(request).value();
  const std::vector<SampleResult> scored = policy.trainer().Score(request.groups, 1).value();
  for (size_t s = 0; s < scored.size(); ++s) {
    EXPECT_EQ(scored[s].logprobs, trained.samples[s].logprobs);
  }
}

TEST(BranchTest, RepeatsBitForBit) {
  TinyPolicy policy(TinyConfig(Architecture::kQwen3, true), 1, {.max_rows = 24});
  ASSERT_TRUE(policy.trainer().ForwardBackward(WideRequest()).ok());
  const std::vector<float> first = policy.Gradients();
  policy.DropGradients();
  ASSERT_TRUE(policy.trainer().ForwardBackward(WideRequest()).ok());
  EXPECT_EQ(policy.Gradients(), first);
}

TEST(BranchTest, RefusesWhatFitsNoMicroBatch) {
  TinyPolicy policy(TinyConfig(Architecture::kLlama, true), 1, {.max_rows = 24});
  ForwardBackwardRequest request = WideRequest();
  request.groups[0].samples[3].tokens.assign(30, 1);
  absl::Status status = policy.trainer().ForwardBackward(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("group 0 wants at most 25 tokens in a response, got 30"),
            std::string::npos)
      << status;
  request = WideRequest();
  request.groups[0].prompt.assign(25, 3);
  status = policy.trainer().ForwardBackward(request).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("group 0 wants at most 24 unique tokens, got 89"),
            std::string::npos)
      << status;
}

TEST(KeptPromptTest, IsIgnoredWhereItDoesNotFit) {
  TinyPolicy policy(TinyConfig(Architecture::kQwen3, true));
  ForwardBackwardRequest request = WideRequest();
  const std::vector<int32_t>& prompt = request.groups[0].prompt;
  const auto skipped = [&](const std::shared_ptr<KeptPrompt>& kept) {
    request.groups[0].kept_prompt = kept;
    const int64_t rows =
        policy.trainer().ForwardBackward(request).value().tokens.prompt_forward_skipped;
    policy.DropGradients();
    return rows;
  };
  EXPECT_EQ(skipped(nullptr), 0);
  EXPECT_EQ(skipped(Keep(policy, prompt, 7)), 20);
  const auto filled_less = Keep(policy, prompt, 7);
  --filled_less->rows_filled;
  EXPECT_EQ(skipped(filled_less), 0);
  EXPECT_EQ(skipped(Keep(policy, std::vector<int32_t>(20, 4), 7)), 0);  // another prompt
  const auto old = Keep(policy, prompt, 7);
  ASSERT_TRUE(policy.trainer().ForwardBackward(WideRequest()).ok());
  ASSERT_TRUE(policy.trainer().OptimStep({.learning_rate = 0.1f}).ok());
  EXPECT_EQ(skipped(old), 0);  // another policy
}

TEST(KeptPromptTest, ServesScoreAndMixesWithOtherGroups) {
  const ModelConfig config = TinyConfig(Architecture::kLlama, true);
  TinyPolicy whole(config), reusing(config, 1, {.max_rows = 24});
  ForwardBackwardRequest request = WideRequest();
  request.groups.push_back({.prompt = {40, 2}, .samples = {{.tokens = {4, 5}, .advantages = {1}}}});
  const ForwardBackwardResult want = whole.trainer().ForwardBackward(request).value();
  request.groups[0].kept_prompt = Keep(reusing, request.groups[0].prompt, 20);
  const ForwardBackwardResult got = reusing.trainer().ForwardBackward(request).value();
  EXPECT_EQ(got.metrics.at("passes"), 2);
  EXPECT_EQ(got.metrics.at("micro_batches"), 4);
  ExpectSameResults(got, want, "kept and mixed");
  ExpectTensorsNear(config, reusing.Gradients(), ToDouble(whole.Gradients()),
                    tolerance::kTreeVersusFlat, "kept and mixed");
  const std::vector<SampleResult> scored = reusing.trainer().Score(request.groups, 1).value();
  for (size_t s = 0; s < scored.size(); ++s) EXPECT_EQ(scored[s].logprobs, got.samples[s].logprobs);
}

}  // namespace
}  // namespace coppice
