// SmolLM2 on a GPU against the CPU: greedy tokens and log-probs of 20 prompts. In f16, which is
// what a daemon takes for it by itself, and in bf16, where it parts more often than it should.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "kernels/base/float16.h"
#include "tests/parity/golden.h"
#include "tests/parity/model_run.h"
#include "tests/support/test_ops.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

constexpr int kTokens = 32;

using Tokens = std::vector<int32_t>;

Tokens Concat(Tokens prompt, const Tokens& continuation, size_t count) {
  prompt.insert(prompt.end(), continuation.begin(),
                continuation.begin() + static_cast<int64_t>(count));
  return prompt;
}

// Of `token` after a row of logits.
double LogProb(const float* row, int64_t vocab, int32_t token) {
  const double top = *std::max_element(row, row + vocab);
  double sum = 0;
  for (int64_t i = 0; i < vocab; ++i) sum += std::exp(row[i] - top);
  return row[token] - top - std::log(sum);
}

// Log-probs of the continuation, given the prompt and what comes before.
std::vector<double> LogProbs(ModelRun& run, const Tokens& prompt, const Tokens& continuation) {
  const int64_t vocab = run.model().config.vocab;
  const std::vector<float> logits =
      run.Logits(Concat(prompt, continuation, continuation.size() - 1));
  std::vector<double> result;
  for (size_t i = 0; i < continuation.size(); ++i) {
    const float* row = logits.data() + static_cast<int64_t>(prompt.size() - 1 + i) * vocab;
    result.push_back(LogProb(row, vocab, continuation[i]));
  }
  return result;
}

TEST(SmolLm2ComputeTypeTest, IsF16) {
  const auto type = ComputeTypeOf(SmolLm2Path());
  ASSERT_TRUE(type.ok()) << type.status();
  EXPECT_EQ(type->dtype, DType::kF16) << type->because;
}

class SmolLm2DeviceTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const absl::Status device = CreateTestOps(GetParam()).status();
    if (SkipsDevice(GetParam(), device)) GTEST_SKIP() << device;
    ASSERT_TRUE(device.ok()) << device;
    const GoldenArrays golden{GoldenPath("smollm2.safetensors")};
    for (int i = 0; golden.Has(absl::StrCat("greedy.", i, ".prompt")); ++i) {
      prompts_.push_back(golden.Tokens(absl::StrCat("greedy.", i, ".prompt")));
      want_.push_back(golden.Tokens(absl::StrCat("greedy.", i, ".continuation")));
    }
    ASSERT_EQ(prompts_.size(), 20u);
    cpu_ = std::make_unique<ModelRun>(SmolLm2Path());
    gpu_ = std::make_unique<ModelRun>(SmolLm2Path(), GetParam());
  }

  static DType dtype() { return ComputeDType(GetParam()); }
  static double Limit(double bf16, double f16) { return dtype() == DType::kF16 ? f16 : bf16; }

  std::vector<Tokens> prompts_, want_;
  std::unique_ptr<ModelRun> cpu_, gpu_;
};

// Up to the first choice that is closer than the devices' log-probs: from there on the two have
// different prompts. These are listed.
TEST_P(SmolLm2DeviceTest, GreedyTokensAreTheCpusButForNearTies) {
  const std::vector<Tokens> got = gpu_->Greedy(prompts_, kTokens);
  int ties = 0;
  for (size_t i = 0; i < prompts_.size(); ++i) {
    const auto [a, b] = std::mismatch(got[i].begin(), got[i].end(), want_[i].begin());
    if (a == got[i].end()) continue;
    const size_t at = static_cast<size_t>(a - got[i].begin());
    const std::vector<float> logits = cpu_->Logits(Concat(prompts_[i], want_[i], at));
    const float* row = &logits[logits.size() - cpu_->model().config.vocab];
    const double gap = row[*b] - row[*a];
    std::cout << "near tie: prompt " << i << " token " << at << ": cpu " << *b << ", cuda " << *a
              << ", apart by " << gap << " nats on the cpu\n";
    EXPECT_LE(gap, tolerance::kNearTie);
    ++ties;
  }
  std::cout << "near ties: " << ties << " of " << prompts_.size() << " prompts\n";
  EXPECT_LE(ties, static_cast<int>(prompts_.size()) / 4);
}

// The weights as the GPU holds them: it computes with them, and nothing else, as the CPU does.
void RoundTo(DType dtype, ModelRun& run) {
  float* weights = run.model().params.flat.f32();
  for (int64_t i = 0; i < run.model().params.flat.num_elements(); ++i) {
    weights[i] = FloatFrom16(dtype, Bits16FromFloat(dtype, weights[i]));
  }
}

TEST_P(SmolLm2DeviceTest, LogProbsAgree) {
  RoundTo(dtype(), *cpu_);
  double sum = 0, largest = 0;
  int64_t count = 0;
  for (size_t i = 0; i < prompts_.size(); ++i) {
    const std::vector<double> cpu = LogProbs(*cpu_, prompts_[i], want_[i]);
    const std::vector<double> gpu = LogProbs(*gpu_, prompts_[i], want_[i]);
    for (size_t t = 0; t < cpu.size(); ++t, ++count) {
      sum += std::abs(cpu[t] - gpu[t]);
      largest = std::max(largest, std::abs(cpu[t] - gpu[t]));
    }
  }
  std::cout << "log-probs of " << count << " tokens: mean difference "
            << sum / static_cast<double>(count) << ", largest " << largest << '\n';
  EXPECT_LE(sum / static_cast<double>(count),
            Limit(tolerance::kDeviceLogProb, tolerance::kF16LogProb));
  EXPECT_LE(largest, tolerance::kDeviceLogProb);
}

INSTANTIATE_TEST_SUITE_P(Devices, SmolLm2DeviceTest, testing::ValuesIn(kCudaDevices));

}  // namespace
}  // namespace coppice
