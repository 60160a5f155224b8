// Llama, Qwen2 and Qwen3 with random weights, saved by transformers: logits, greedy tokens and
// every gradient agree with it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "tests/parity/golden.h"
#include "tests/parity/model_run.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

class TinyModelParityTest : public testing::TestWithParam<const char*> {
 protected:
  std::string directory() const { return GoldenPath(absl::StrCat("tiny/", GetParam())); }
  GoldenArrays golden_{directory() + "/golden.safetensors"};
  ModelRun run_{directory()};
};

TEST_P(TinyModelParityTest, LogitsAgree) {
  const std::vector<float> want = golden_.Floats("logits");
  const std::vector<float> got = run_.Logits(golden_.Tokens("logits.tokens"));
  EXPECT_LT(RelativeError(got, want), tolerance::kParity);
  float largest = 0, worst = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    worst = std::max(worst, std::abs(got[i] - want[i]));
  }
  EXPECT_LT(worst, tolerance::kParity * largest);
}

TEST_P(TinyModelParityTest, GreedyContinuationsAreIdentical) { ExpectGreedyParity(run_, golden_); }

TEST_P(TinyModelParityTest, EveryGradientAgrees) {
  const Parameters& gradients = run_.GroupGradients(golden_);
  for (const NamedTensor& t : HfTensors(run_.model().config, gradients)) {
    const std::vector<float> got(t.view.f32(), t.view.f32() + t.view.num_elements());
    EXPECT_LT(RelativeError(got, golden_.Floats("grad." + t.name)), tolerance::kParity) << t.name;
  }
}

// The digests of SmolLM2's test stand for whole arrays: a difference in few elements shows.
TEST(DigestTest, SeesDifferencesBetweenTheSampledEntries) {
  std::vector<float> x(100000);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
  const std::vector<double> exact = Digest(x.data(), std::ssize(x));
  const std::vector<float> want(exact.begin(), exact.end());
  EXPECT_LT(DigestRelativeError(exact, want), tolerance::kParity / 10);
  x[777] += 0.2f;  // 9e-4 of the norm
  EXPECT_GT(DigestRelativeError(Digest(x.data(), std::ssize(x)), want), 5 * tolerance::kParity);
}

INSTANTIATE_TEST_SUITE_P(Models, TinyModelParityTest,
                         testing::Values("llama_llama3_sharded", "llama_linear_tied", "qwen2_tied",
                                         "qwen2_untied", "qwen3_tied", "qwen3_untied_mha"),
                         [](const auto& test_info) { return std::string(test_info.param); });

}  // namespace
}  // namespace coppice
