// P3: gradients of the shared tree equal the sum over independent sequences.
#include <gtest/gtest.h>

#include "tests/support/tolerances.h"
#include "tests/trainer/trainer_fixture.h"

namespace coppice {
namespace {

// Counts over a whole request, by its definition.
double TotalMask(const ForwardBackwardRequest& request, bool sequences) {
  double total = 0;
  for (const TrainGroup& group : request.groups) {
    for (const TrainSample& sample : group.samples) {
      double mask = 0;
      for (size_t t = 0; t < sample.tokens.size(); ++t) {
        mask += sample.loss_mask.empty() ? 1 : sample.loss_mask[t];
      }
      total += sequences ? (mask > 0) : mask;
    }
  }
  return total;
}

// The request's global denominator, to be given to each of its sequences.
double Denominator(const ForwardBackwardRequest& request) {
  using Aggregation = LossConfig::Aggregation;
  if (request.loss.denominator.has_value()) return *request.loss.denominator;
  if (request.loss.kind == LossConfig::Kind::kGspo) return TotalMask(request, true);
  switch (request.loss.aggregation) {
    case Aggregation::kTokenMean:
      return TotalMask(request, false);
    case Aggregation::kSeqMeanTokenMean:
    case Aggregation::kSeqMeanTokenSum:
      return TotalMask(request, true);
    case Aggregation::kConstant:
    case Aggregation::kSum:
      break;
  }
  return 1;
}

struct FlatSum {
  double loss = 0;
  std::vector<double> gradients;
  std::vector<std::vector<float>> logprobs;
};

// Every sequence alone, in its own call; gradients added in double.
FlatSum RunFlat(TinyPolicy& policy, const ForwardBackwardRequest& request) {
  FlatSum sum;
  sum.gradients.resize(NumParameterElements(policy.config()));
  const double denominator = std::max(Denominator(request), 1e-9);
  for (const TrainGroup& group : request.groups) {
    for (const TrainSample& sample : group.samples) {
      ForwardBackwardRequest alone{.groups = {{group.prompt, {sample}}}, .loss = request.loss};
      alone.loss.denominator = denominator;
      const ForwardBackwardResult result = policy.trainer().ForwardBackward(alone).value();
      EXPECT_EQ(result.tokens.unique, result.tokens.flat);
      sum.loss += result.loss;
      sum.logprobs.push_back(result.samples[0].logprobs);
      const std::vector<float> gradients = policy.Gradients();
      for (size_t i = 0; i < gradients.size(); ++i) sum.gradients[i] += gradients[i];
      policy.DropGradients();
    }
  }
  return sum;
}

void CheckRequest(TinyPolicy& policy, const ForwardBackwardRequest& request,
                  const std::string& what) {
  const FlatSum flat = RunFlat(policy, request);
  const ForwardBackwardResult tree = policy.trainer().ForwardBackward(request).value();
  EXPECT_LE(tree.tokens.unique, tree.tokens.flat) << what;
  EXPECT_NEAR(tree.loss, flat.loss, tolerance::kTreeVersusFlat * (1 + std::abs(flat.loss))) << what;
  ExpectTensorsNear(policy.config(), policy.Gradients(), flat.gradients, tolerance::kTreeVersusFlat,
                    what);
  for (size_t s = 0; s < flat.logprobs.size(); ++s) {
    ASSERT_EQ(tree.samples[s].logprobs.size(), flat.logprobs[s].size());
    for (size_t t = 0; t < flat.logprobs[s].size(); ++t) {
      EXPECT_NEAR(tree.samples[s].logprobs[t], flat.logprobs[s][t], tolerance::kTreeVersusFlat * 10)
          << what;
    }
  }
  policy.DropGradients();
}

class TreeGradientTest : public testing::TestWithParam<ModelConfig> {};

TEST_P(TreeGradientTest, EqualsTheSumOverSequencesOnRandomTrees) {
  TinyPolicy policy(GetParam());
  for (uint64_t seed = 0; seed < 70; ++seed) {  // 210 trees over the three architectures
    Random random(seed);
    CheckRequest(policy, RandomRequest(random, policy.config().vocab),
                 "seed " + std::to_string(seed));
    if (testing::Test::HasFailure()) break;
  }
}

INSTANTIATE_TEST_SUITE_P(Architectures, TreeGradientTest,
                         testing::Values(TinyConfig(Architecture::kLlama, false),
                                         TinyConfig(Architecture::kQwen2, true),
                                         TinyConfig(Architecture::kQwen3, false)),
                         [](const auto& test) { return ArchitectureName(test.param); });

}  // namespace
}  // namespace coppice
