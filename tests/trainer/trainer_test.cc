#include "trainer/trainer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/support/narrow_ops.h"
#include "tests/support/tolerances.h"
#include "tests/trainer/trainer_fixture.h"
#include "trainer/activations.h"

namespace coppice {
namespace {

TinyPolicy MakePolicy(const Trainer::Options& options = {}) {
  return TinyPolicy(TinyConfig(Architecture::kLlama, true), 1, options);
}

std::vector<double> ToDouble(const std::vector<float>& v) { return {v.begin(), v.end()}; }

// Two groups with given advantages; the groups share their first tokens.
ForwardBackwardRequest SmallRequest() {
  ForwardBackwardRequest request;
  request.groups = {{.prompt = {5, 6, 7},
                     .samples = {{.tokens = {8, 9, 10}, .advantages = {1}},
                                 {.tokens = {8, 11}, .advantages = {-0.5f}}}},
                    {.prompt = {5, 6},
                     .samples = {{.tokens = {7, 12, 13, 14}, .advantages = {0.25f}},
                                 {.tokens = {20}, .advantages = {2}}}}};
  return request;
}

TEST(TrainerTest, CountsTokensAndReportsPhases) {
  TinyPolicy policy = MakePolicy();
  const ForwardBackwardResult result = policy.trainer().ForwardBackward(SmallRequest()).value();
  // Rows: 5 6 7 | 8 9 | 12 13; the last token of a response needs none.
  EXPECT_EQ(result.tokens.unique, 7);
  EXPECT_EQ(result.tokens.flat, 5 + 4 + 5 + 2);
  EXPECT_EQ(result.tokens.with_loss, 3 + 2 + 4 + 1);
  ASSERT_EQ(result.samples.size(), 4u);
  EXPECT_EQ(result.samples[2].logprobs.size(), 4u);
  std::vector<std::string> phases;
  for (const auto& [name, seconds] : result.phases) phases.push_back(name);
  EXPECT_EQ(phases,
            (std::vector<std::string>{"build_tree", "forward", "head", "loss", "backward"}));
}

TEST(TrainerTest, LeavesLogprobsOutWhenNotAsked) {
  TinyPolicy policy = MakePolicy();
  ForwardBackwardRequest request = SmallRequest();
  const ForwardBackwardResult with = policy.trainer().ForwardBackward(request).value();
  const std::vector<float> gradients = policy.Gradients();
  policy.DropGradients();
  request.return_logprobs = false;
  request.groups[0].samples[0].loss_mask = {1, 1, 1};
  const ForwardBackwardResult without = policy.trainer().ForwardBackward(request).value();
  EXPECT_TRUE(without.samples[0].logprobs.empty());
  EXPECT_EQ(with.loss, without.loss);
  EXPECT_EQ(gradients, policy.Gradients());
}

TEST(TrainerTest, GradientsAddUpOverCalls) {
  TinyPolicy policy = MakePolicy();
  ForwardBackwardRequest first = SmallRequest(), second = SmallRequest();
  first.loss.denominator = second.loss.denominator = 10;
  second.groups.pop_back();
  std::vector<double> sum(policy.Weights().size());
  for (const ForwardBackwardRequest& request : {first, second}) {
    ASSERT_TRUE(policy.trainer().ForwardBackward(request).ok());
    const std::vector<float> gradients = policy.Gradients();
    for (size_t i = 0; i < sum.size(); ++i) sum[i] += gradients[i];
    policy.DropGradients();
  }
  ASSERT_TRUE(policy.trainer().ForwardBackward(first).ok());
  ASSERT_TRUE(policy.trainer().ForwardBackward(second).ok());
  ExpectTensorsNear(policy.config(), policy.Gradients(), sum, tolerance::kTreeVersusFlat, "sum");
}

TEST(TrainerTest, MicroBatchesChangeNeitherGradientsNorResults) {
  int num_split = 0;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Random random(seed);
    ForwardBackwardRequest request = RandomRequest(random, 61);
    for (int i = 0; i < 5; ++i) {
      for (TrainGroup& extra : RandomRequest(random, 61).groups) request.groups.push_back(extra);
    }

    TinyPolicy whole = MakePolicy();
    TinyPolicy split = MakePolicy({.max_rows = 40});
    const auto want = whole.trainer().ForwardBackward(request);
    const auto got = split.trainer().ForwardBackward(request);
    ASSERT_TRUE(want.ok()) << want.status();
    if (!got.ok()) continue;  // one group alone is larger
    EXPECT_EQ(want->metrics.at("passes"), 1);
    if (got->metrics.at("passes") > 1) ++num_split;
    EXPECT_GE(got->tokens.unique, want->tokens.unique);
    EXPECT_NEAR(got->loss, want->loss, tolerance::kTreeVersusFlat * (1 + std::abs(want->loss)));
    ExpectTensorsNear(whole.config(), split.Gradients(), ToDouble(whole.Gradients()),
                      tolerance::kTreeVersusFlat, "micro-batches");
    for (size_t s = 0; s < want->samples.size(); ++s) {
      for (size_t t = 0; t < want->samples[s].logprobs.size(); ++t) {
        EXPECT_NEAR(got->samples[s].logprobs[t], want->samples[s].logprobs[t],
                    tolerance::kTreeVersusFlat);
      }
    }
  }
  EXPECT_GE(num_split, 8);
}

TEST(TrainerTest, SplitsWholeGroupsAndKeepsSharedPromptsTogether) {
  ForwardBackwardRequest request;
  for (const int32_t first : {1, 9, 1, 9}) {  // two prompts, interleaved
    request.groups.push_back({.prompt = std::vector<int32_t>(10, first),
                              .samples = {{.tokens = {first, 3}, .advantages = {1}}}});
  }
  TinyPolicy policy = MakePolicy({.max_rows = 12});
  const ForwardBackwardResult result = policy.trainer().ForwardBackward(request).value();
  EXPECT_EQ(result.metrics.at("passes"), 2);
  EXPECT_EQ(result.tokens.unique, 2 * 11);
}

// Acknowledged gradients survive a call that needs more memory than there is, in any of its passes.
TEST(TrainerTest, LackOfMemoryIsFoundBeforeAGradientChanges) {
  const auto group = [](int32_t token, size_t prompt) {
    return TrainGroup{.prompt = std::vector<int32_t>(prompt, token),
                      .samples = {{.tokens = {token, 3}, .advantages = {1}}}};
  };
  TinyPolicy policy = MakePolicy({.max_rows = 32});
  ForwardBackwardRequest small, large;
  small.groups = {group(1, 4)};
  large.groups = {group(1, 4), group(9, 30)};  // two passes; the first fits the memory there is
  ASSERT_TRUE(policy.trainer().ForwardBackward(small).ok());
  const std::vector<float> gradients = policy.Gradients();

  policy.ops().FailAllocations();

  EXPECT_EQ(policy.trainer().ForwardBackward(large).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(policy.trainer().has_pending_gradients());
  EXPECT_EQ(policy.Gradients(), gradients);
}

TEST(TrainerTest, RecomputingLessOrMoreGivesTheSameBits) {
  ForwardBackwardRequest request;
  request.groups = {{.prompt = std::vector<int32_t>(60, 3)}};
  for (const int32_t first : {10, 20, 30, 40}) {
    request.groups[0].samples.push_back({.tokens = {first, 5, 6, 7}, .advantages = {1}});
  }
  const int64_t rows = 60 + 4 * 3, head_rows = 1 + 4 * 3;
  for (const Architecture architecture : {Architecture::kQwen2, Architecture::kQwen3}) {
    ModelConfig config = TinyConfig(architecture, false);
    config.num_layers = 6;
    TinyPolicy all(config);
    const ForwardBackwardResult want = all.trainer().ForwardBackward(request).value();
    EXPECT_EQ(want.metrics.at("recompute"), 0);
    const auto size = [&](Retention retention) {
      return Activations::SizeBytes(config, ops::ActivationTypes(), rows, head_rows, retention);
    };
    const int64_t least =
        Activations::SizeBytes(config, ops::ActivationTypes(), rows + 8, rows + 8, Retain::kInputs);
    const std::pair<int64_t, double> cases[] = {
        {size({Retain::kProjections, 3}), 1}, {size(Retain::kProjections), 1},
        {size({Retain::kLean, 2}), 2},        {size(Retain::kLean), 2},
        {size({Retain::kInputs, 4}), 3},      {least, 3}};
    for (const auto& [budget, level] : cases) {
      TinyPolicy some(config, 1, {.activation_bytes = budget});
      const auto got = some.trainer().ForwardBackward(request);
      ASSERT_TRUE(got.ok()) << got.status();
      EXPECT_EQ(got->metrics.at("recompute"), level);
      EXPECT_LE(got->metrics.at("activation_bytes"), budget);
      EXPECT_EQ(got->loss, want.loss);
      EXPECT_EQ(some.Gradients(), all.Gradients());
      // Gate and up are written once, for backward, and never for scores.
      const int64_t kept = some.ops().kept_gate_ups();
      EXPECT_EQ(kept, (config.num_layers - 1) * rows + head_rows);
      ASSERT_TRUE(some.trainer().Score(request.groups, 1).ok());
      EXPECT_EQ(some.ops().kept_gate_ups(), kept);
    }
  }
}

TEST(TrainerTest, ScoreRefusesLogprobsThatAreNoNumbers) {
  TinyPolicy policy(TinyConfig(Architecture::kLlama, false));
  const ForwardBackwardRequest request = SmallRequest();
  EXPECT_TRUE(policy.trainer().Score(request.groups, 1).ok());
  policy.model().params.embedding.f32()[12 * policy.config().hidden] =
      std::numeric_limits<float>::quiet_NaN();
  const absl::Status status = policy.trainer().Score(request.groups, 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
  EXPECT_NE(status.message().find("group 1 sample 0"), std::string::npos) << status;
}

// What only elementwise work needs gives way, products do not.
TEST(TrainerTest, LendsAttentionTheMemoryThatIsLeft) {
  ForwardBackwardRequest request;
  request.groups = {{.prompt = std::vector<int32_t>(60, 3),
                     .samples = {{.tokens = {10, 5}, .advantages = {1}},
                                 {.tokens = {20, 5}, .advantages = {-1}}}}};
  ModelConfig config = TinyConfig(Architecture::kQwen3, false);
  config.num_layers = 6;
  TinyPolicy all(config);
  const ForwardBackwardResult want = all.trainer().ForwardBackward(request).value();
  const auto size = [&](Retention retention, int64_t workspace = 0) {
    return Activations::SizeBytes(config, ops::ActivationTypes(), 62, 3, retention, workspace);
  };
  constexpr int64_t kPlenty = int64_t{1} << 30;
  const int64_t scores = 4 * 2 * (62 * 512 + 60 * 61 / 2 + 60 * 2 + 2);  // of 4 heads
  const int64_t statistics = 2 * 128 * 4 * 4 + 4096;                     // of a tile of rows
  const int64_t sums = 2 * 128 * config.kv_dim() * 4;                    // from round to round
  struct Case {
    int64_t budget, recompute, held, wanted = kPlenty, head_dim = 0;
  };
  const int64_t a_quarter = size({Retain::kLean, 3}, scores / 4 + statistics);
  const Case cases[] = {
      {kPlenty, 0, size(Retain::kAll, scores + statistics)},
      {kPlenty, 0, size(Retain::kAll, scores / 2 + statistics + sums), scores / 2},
      {kPlenty, 0, size(Retain::kAll, statistics), kPlenty, config.head_dim + 1},
      {size(Retain::kAll), 1, size(Retain::kAll)},
      {a_quarter, 2, a_quarter},
      {size(Retain::kLean), 3, size(Retain::kLean)}};
  for (const Case& c : cases) {
    TinyPolicy some(config, 1, {.activation_bytes = c.budget});
    some.ops().WantWorkspace(c.wanted, c.head_dim);
    const auto got = some.trainer().ForwardBackward(request);
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(got->metrics.at("recompute"), c.recompute);
    EXPECT_EQ(got->metrics.at("activation_bytes"), c.held);
    EXPECT_EQ(some.Gradients(), all.Gradients());
    // Until then it is the head's; scoring has no use for it.
    const int64_t lent = some.ops().lent_bytes();
    EXPECT_EQ(lent > 0, c.held > size(Retain(static_cast<int>(Retain::kAll) - c.recompute)));
    ASSERT_TRUE(some.trainer().Score(request.groups, 1).ok());
    EXPECT_EQ(some.ops().lent_bytes(), lent);
  }
}

// Of two micro-batches, so that gradients are added to rounded ones, and the update from them.
TEST(TrainerTest, GradientsOfMatricesInBf16AreCloseAndSoIsTheUpdate) {
  for (const Architecture architecture :
       {Architecture::kLlama, Architecture::kQwen2, Architecture::kQwen3}) {
    const ModelConfig config = TinyConfig(architecture, architecture == Architecture::kQwen2);
    TinyPolicy exact(config, 1, {.max_rows = 8});
    TinyPolicy rounded(config, 1, {.max_rows = 8, .gradient_dtype = DType::kBF16});
    const std::vector<float> before = exact.Weights();
    ForwardBackwardRequest request = SmallRequest();
    request.groups.push_back(
        {.prompt = {9, 8, 7}, .samples = {{.tokens = {1, 2, 3, 4}, .advantages = {1}}}});
    const ForwardBackwardResult want = exact.trainer().ForwardBackward(request).value();
    const ForwardBackwardResult got = rounded.trainer().ForwardBackward(request).value();
    EXPECT_GT(got.metrics.at("micro_batches"), 1);
    EXPECT_EQ(got.loss, want.loss);

    const AdamConfig adam = {.learning_rate = 1e-3f};
    const OptimStepResult step = exact.trainer().OptimStep(adam).value();
    const OptimStepResult same = rounded.trainer().OptimStep(adam).value();
    EXPECT_NEAR(same.grad_norm, step.grad_norm, step.grad_norm / 256);
    EXPECT_NE(same.grad_norm, step.grad_norm);
    const std::vector<float> weights = exact.Weights(), close = rounded.Weights();
    double moved = 0, apart = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      moved += std::abs(double{weights[i]} - before[i]);
      apart += std::abs(double{weights[i]} - close[i]);
    }
    EXPECT_LT(apart, moved / 100);
  }
}

TEST(TrainerTest, RefusesGradientsOfOtherTypes) {
  TinyPolicy policy = MakePolicy();
  const SteadyClock clock;
  const auto trainer =
      Trainer::Create({.gradient_dtype = DType::kF16}, policy.model(), policy.decoder(), clock);
  EXPECT_EQ(trainer.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(trainer.status().message().find("wants f32 or bf16, got f16"), std::string::npos);
}

TEST(TrainerTest, RefusesGradientsInBf16WhereTheDeviceComputesInF16) {
  NarrowOps ops(DType::kF16);
  Model model = RandomModel(TinyConfig(Architecture::kLlama, true), 1, ops).value();
  const auto decoder = Decoder::Create(model.config, ops).value();
  const SteadyClock clock;
  EXPECT_TRUE(Trainer::Create({}, model, *decoder, clock).ok());
  const auto trainer = Trainer::Create({.gradient_dtype = DType::kBF16}, model, *decoder, clock);
  EXPECT_EQ(trainer.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(trainer.status().message().find("use --gradient_dtype=f32 or --compute_dtype=bf16"),
            std::string::npos);
}

TEST(TrainerTest, ScoreAndForwardBackwardAgreeBitForBit) {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    Random random(seed);
    TinyPolicy policy(TinyConfig(Architecture::kQwen3, true));
    const ForwardBackwardRequest request = RandomRequest(random, policy.config().vocab);
    const auto scores = policy.trainer().Score(request.groups, request.loss.temperature).value();
    EXPECT_FALSE(policy.trainer().has_pending_gradients());
    const auto trained = policy.trainer().ForwardBackward(request).value();
    for (size_t s = 0; s < scores.size(); ++s) {
      EXPECT_EQ(scores[s].logprobs, trained.samples[s].logprobs) << "seed " << seed;
    }
  }
}

TEST(TrainerTest, OneBranchNeverSeesAnother) {
  TinyPolicy policy = MakePolicy();
  ForwardBackwardRequest request = SmallRequest();
  request.groups = {{.prompt = {5, 6, 7, 8},
                     .samples = {{.tokens = {10, 11, 12, 13}}, {.tokens = {20, 21, 22, 23}}}}};
  const auto before = policy.trainer().Score(request.groups, 1).value();
  for (const int changed : {0, 1}) {
    std::vector<TrainGroup> groups = request.groups;
    groups[0].samples[changed].tokens[1] = 40;  // keeps the order of the branches
    groups[0].samples[changed].tokens[2] = 41;
    const auto after = policy.trainer().Score(groups, 1).value();
    EXPECT_EQ(after[1 - changed].logprobs, before[1 - changed].logprobs);
    EXPECT_EQ(after[changed].logprobs[0], before[changed].logprobs[0]);
    EXPECT_NE(after[changed].logprobs, before[changed].logprobs);
  }
}

TEST(TrainerTest, OnlyAnUpdateRaisesTheVersion) {
  TinyPolicy policy = MakePolicy();
  Trainer& trainer = policy.trainer();
  EXPECT_EQ(trainer.OptimStep({}).status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(trainer.ForwardBackward(SmallRequest()).ok());
  EXPECT_TRUE(trainer.has_pending_gradients());
  EXPECT_EQ(Raw(trainer.policy_version()), 0u);
  EXPECT_FALSE(trainer.has_optimizer_state());
  const OptimStepResult step = trainer.OptimStep({.learning_rate = 1e-3f}).value();
  EXPECT_FALSE(step.skipped);
  EXPECT_EQ(Raw(step.policy_version), 1u);
  EXPECT_EQ(Raw(trainer.policy_version()), 1u);
  EXPECT_FALSE(trainer.has_pending_gradients());
  EXPECT_TRUE(trainer.has_optimizer_state());
  EXPECT_EQ(trainer.OptimStep({}).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(TrainerTest, ANonFiniteGradientNormSkipsTheUpdate) {
  TinyPolicy policy = MakePolicy();
  const float good = policy.Weights()[70];
  policy.SetWeight(70, std::numeric_limits<float>::infinity());
  const std::vector<float> weights = policy.Weights();
  ForwardBackwardRequest request = SmallRequest();
  request.groups[0].prompt = {2, 6, 7};  // reads the broken row of the embedding
  const ForwardBackwardResult result = policy.trainer().ForwardBackward(request).value();
  for (const auto& [name, value] : result.metrics) EXPECT_TRUE(std::isfinite(value)) << name;
  const OptimStepResult step = policy.trainer().OptimStep({.learning_rate = 1}).value();
  EXPECT_TRUE(step.skipped);
  EXPECT_NE(step.skip_reason, "");
  EXPECT_EQ(Raw(policy.trainer().policy_version()), 0u);
  EXPECT_EQ(policy.Weights(), weights);
  EXPECT_FALSE(policy.trainer().has_pending_gradients());

  policy.SetWeight(70, good);
  ASSERT_TRUE(policy.trainer().ForwardBackward(request).ok());
  EXPECT_FALSE(policy.trainer().OptimStep({.learning_rate = 1e-3f}).value().skipped);
}

// AdamW from its definition, in double.
TEST(TrainerTest, UpdatesByAdamWWithClippingAndDecaysMatricesOnly) {
  TinyPolicy policy(TinyConfig(Architecture::kQwen2, false));
  const AdamConfig adam{.learning_rate = 0.01f, .weight_decay = 0.1f, .grad_clip_norm = 0.5f};
  const std::vector<float> start = policy.Weights();
  std::vector<double> w = ToDouble(start), m(w.size()), v(w.size()), decay(w.size());
  for (const NamedTensor& tensor : HfTensors(policy.config(), policy.model().params)) {
    const int64_t begin = tensor.view.f32() - policy.model().params.flat.f32();
    std::fill_n(decay.begin() + begin, tensor.view.num_elements(), tensor.decay ? 0.1 : 0.0);
  }
  for (int step = 1; step <= 3; ++step) {
    ASSERT_TRUE(policy.trainer().ForwardBackward(SmallRequest()).ok());
    const std::vector<float> gradients = policy.Gradients();
    double norm = 0;
    for (const double g : gradients) norm += g * g;
    norm = std::sqrt(norm);
    ASSERT_GT(norm, adam.grad_clip_norm);
    const OptimStepResult result = policy.trainer().OptimStep(adam).value();
    EXPECT_NEAR(result.grad_norm, norm, tolerance::kOpBackward * norm);
    for (size_t i = 0; i < w.size(); ++i) {
      const double g = gradients[i] * adam.grad_clip_norm / (norm + 1e-6);
      m[i] = 0.9 * m[i] + 0.1 * g;
      v[i] = 0.95 * v[i] + 0.05 * g * g;
      const double mean = m[i] / (1 - std::pow(0.9, step));
      const double deviation = std::sqrt(v[i] / (1 - std::pow(0.95, step)));
      w[i] -= 0.01 * (mean / (deviation + 1e-8) + decay[i] * w[i]);
    }
    const std::vector<float> got = policy.Weights();
    for (size_t i = 0; i < w.size(); ++i) {
      ASSERT_NEAR(got[i], w[i], tolerance::kAdamW) << "step " << step << " element " << i;
    }
  }
}

TEST(TrainerTest, OverfitsAFewSequences) {
  TinyPolicy policy = MakePolicy();
  ForwardBackwardRequest request = SmallRequest();
  request.loss.kind = LossConfig::Kind::kCrossEntropy;
  for (TrainGroup& group : request.groups) {
    for (TrainSample& sample : group.samples) sample.advantages.clear();
  }
  double first = 0, last = 0;
  for (int step = 0; step < 40; ++step) {
    last = policy.trainer().ForwardBackward(request).value().loss;
    if (step == 0) first = last;
    ASSERT_TRUE(policy.trainer().OptimStep({.learning_rate = 0.01f}).ok());
  }
  EXPECT_LT(last, first / 2);
}

TEST(TrainerTest, ReinforcesWhatIsRewarded) {
  TinyPolicy policy = MakePolicy();
  ForwardBackwardRequest request;
  request.groups = {
      {.prompt = {5, 6},
       .samples = {{.tokens = {8, 9}, .reward = 1}, {.tokens = {10, 11}, .reward = 0}}}};
  request.loss.advantage = LossConfig::Advantage::kGroupNormalized;
  const auto before = policy.trainer().Score(request.groups, 1).value();
  for (int step = 0; step < 5; ++step) {
    const ForwardBackwardResult result = policy.trainer().ForwardBackward(request).value();
    EXPECT_EQ(result.metrics.at("reward_mean"), 0.5);
    ASSERT_TRUE(policy.trainer().OptimStep({.learning_rate = 0.005f}).ok());
  }
  const auto after = policy.trainer().Score(request.groups, 1).value();
  EXPECT_GT(after[0].logprobs[0], before[0].logprobs[0]);
  EXPECT_LT(after[1].logprobs[0], before[1].logprobs[0]);
}

// The derivative of the loss along the gradient of each tensor, against central differences of the
// whole computation.
TEST(TrainerTest, GradientsAreTheSlopesOfTheLossForEveryKind) {
  TinyPolicy policy(TinyConfig(Architecture::kQwen3, false));
  for (int kind = 0; kind <= static_cast<int>(LossConfig::Kind::kCispo); ++kind) {
    ForwardBackwardRequest request = SmallRequest();
    request.loss.kind = static_cast<LossConfig::Kind>(kind);
    request.loss.kl = static_cast<LossConfig::KlEstimator>(1 + kind % 3);
    request.loss.kl_coef = 0.1f;
    request.loss.entropy_coef = 0.1f;
    request.loss.temperature = 0.9f;
    // Wide clips keep the loss smooth; cispo's weight is constant only where it is clipped.
    const bool cispo = request.loss.kind == LossConfig::Kind::kCispo;
    request.loss.clip_low = 0.99f;
    request.loss.clip_high = cispo ? 0.0f : 1000.0f;
    const auto base = policy.trainer().Score(request.groups, 0.9f).value();
    size_t s = 0;
    for (TrainGroup& group : request.groups) {
      for (TrainSample& sample : group.samples) {
        for (const float l : base[s++].logprobs) {
          sample.old_logprobs.push_back(l - (cispo ? 2.0f : 0.3f));
          sample.ref_logprobs.push_back(l - 0.2f);
        }
      }
    }
    ASSERT_TRUE(policy.trainer().ForwardBackward(request).ok());
    const std::vector<float> gradients = policy.Gradients();
    const std::vector<float> weights = policy.Weights();
    policy.DropGradients();
    const auto loss_at = [&](int64_t begin, int64_t n, double scale) {
      for (int64_t i = begin; i < begin + n; ++i) {
        policy.SetWeight(i, static_cast<float>(weights[i] + scale * gradients[i]));
      }
      const double loss = policy.trainer().ForwardBackward(request).value().loss;
      policy.DropGradients();
      for (int64_t i = begin; i < begin + n; ++i) policy.SetWeight(i, weights[i]);
      return loss;
    };
    for (const auto& [name, view] : ArenaTensors(policy.model().params)) {
      const int64_t begin = view.f32() - policy.model().params.flat.f32();
      double norm = 0;
      for (int64_t i = 0; i < view.num_elements(); ++i) {
        norm += double{gradients[begin + i]} * gradients[begin + i];
      }
      norm = std::sqrt(norm);
      const double scale = tolerance::kModelDifferenceStep / norm;
      const double slope = (loss_at(begin, view.num_elements(), scale) -
                            loss_at(begin, view.num_elements(), -scale)) /
                           (2 * tolerance::kModelDifferenceStep);
      EXPECT_NEAR(slope, norm, tolerance::kModelDifference * (1 + norm))
          << "loss kind " << kind << ", " << name;
    }
  }
}

// ---- Bad input

struct BadInput {
  const char* says;  // part of the message
  std::function<void(ForwardBackwardRequest&)> spoil;
};

TEST(TrainerTest, RefusesBadInputByNameAndChangesNothing) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<BadInput> cases = {
      {"groups want", [](auto& r) { r.groups.clear(); }},
      {"group 1 prompt", [](auto& r) { r.groups[1].prompt.clear(); }},
      {"group 0 samples", [](auto& r) { r.groups[0].samples.clear(); }},
      {"group 0 sample 1 tokens", [](auto& r) { r.groups[0].samples[1].tokens.clear(); }},
      {"group 1 sample 0 tokens", [](auto& r) { r.groups[1].samples[0].tokens[2] = 61; }},
      {"group 1 prompt", [](auto& r) { r.groups[1].prompt[0] = -1; }},
      {"context of 128", [](auto& r) { r.groups[0].prompt.resize(126, 3); }},
      {"group 0 sample 0 advantages and reward are both missing",
       [](auto& r) { r.groups[0].samples[0].advantages.clear(); }},
      {"group 0 sample 0 advantages and reward are both given",
       [](auto& r) { r.groups[0].samples[0].reward = 1; }},
      {"group 0 sample 0 advantages wants 3",
       [](auto& r) {
         r.groups[0].samples[0].advantages = {1, 2};
       }},
      {"group 0 sample 1 advantages",
       [nan](auto& r) { r.groups[0].samples[1].advantages = {nan}; }},
      {"group 0 sample 0 reward",
       [](auto& r) { r.loss.advantage = LossConfig::Advantage::kLeaveOneOut; }},
      {"old_logprobs wants 2", [](auto& r) { r.groups[0].samples[1].old_logprobs = {-1}; }},
      {"sampler_logprobs", [nan](auto& r) { r.groups[1].samples[1].sampler_logprobs = {nan}; }},
      {"loss_mask", [](auto& r) { r.groups[1].samples[1].loss_mask = {-1}; }},
      {"weight", [nan](auto& r) { r.groups[1].samples[1].weight = nan; }},
      {"ref_logprobs are missing", [](auto& r) { r.loss.kl = LossConfig::KlEstimator::kK3; }},
      {"sampler_logprobs are missing", [](auto& r) { r.loss.importance_cap = 2; }},
      {"temperature", [](auto& r) { r.loss.temperature = 0; }},
      {"temperature", [nan](auto& r) { r.loss.temperature = nan; }},
      {"clip low", [](auto& r) { r.loss.clip_low = 1.5f; }},
      {"clip high", [](auto& r) { r.loss.clip_high = -1; }},
      {"clip dual", [](auto& r) { r.loss.clip_dual = 0.5f; }},
      {"kl coef", [](auto& r) { r.loss.kl_coef = 0.1f; }},
      {"entropy_coef", [nan](auto& r) { r.loss.entropy_coef = nan; }},
      {"denominator", [](auto& r) { r.loss.denominator = 0; }},
      {"denominator is missing",
       [](auto& r) { r.loss.aggregation = LossConfig::Aggregation::kConstant; }},
      {"group 0 wants at most 16 unique tokens", [](auto& r) { r.groups[0].prompt.resize(20, 3); }},
  };
  TinyPolicy policy = MakePolicy({.max_rows = 16});
  ASSERT_TRUE(policy.trainer().ForwardBackward(SmallRequest()).ok());
  const std::vector<float> gradients = policy.Gradients(), weights = policy.Weights();
  for (const BadInput& bad : cases) {
    SCOPED_TRACE(bad.says);
    ForwardBackwardRequest request = SmallRequest();
    bad.spoil(request);
    const absl::Status status = policy.trainer().ForwardBackward(request).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_NE(status.message().find(bad.says), absl::string_view::npos) << status;
    EXPECT_EQ(policy.Gradients(), gradients);
    EXPECT_EQ(policy.Weights(), weights);
  }
  for (const AdamConfig& adam :
       {AdamConfig{.learning_rate = nan}, AdamConfig{.beta1 = 1}, AdamConfig{.beta2 = -0.1f},
        AdamConfig{.eps = 0}, AdamConfig{.weight_decay = -1}, AdamConfig{.grad_clip_norm = nan}}) {
    EXPECT_EQ(policy.trainer().OptimStep(adam).status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(policy.Gradients(), gradients);
  }
}

}  // namespace
}  // namespace coppice
