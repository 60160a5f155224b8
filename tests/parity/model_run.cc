#include "tests/parity/model_run.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "tests/support/test_ops.h"
#include "tests/support/tolerances.h"

namespace coppice {
namespace {

constexpr int32_t kBlockTokens = 16;

// Appends `tokens` as one sequence that starts at `position`.
void AppendSequence(const std::vector<int32_t>& tokens, int32_t position, int32_t context_node,
                    ops::TokenBatch& batch) {
  const int32_t begin = static_cast<int32_t>(batch.num_rows());
  const int32_t end = begin + static_cast<int32_t>(tokens.size());
  for (const int32_t token : tokens) {
    batch.tokens.push_back(token);
    batch.positions.push_back(position++);
    batch.subtree_end.push_back(end);
  }
  batch.segments.push_back({begin, end, context_node});
}

template <typename T>
T ValueOrDie(absl::StatusOr<T> value) {
  CHECK_OK(value.status());
  return *std::move(value);
}

}  // namespace

ModelRun::ModelRun(const std::string& path, const std::string& device)
    : ops_(ValueOrDie(CreateTestOps(device))) {
  auto model = LoadModel(path, *ops_);
  CHECK(model.ok()) << model.status().ToString() << " (deploy/fetch_model.sh fetches SmolLM2)";
  model_ = *std::move(model);
  decoder_ = ValueOrDie(Decoder::Create(model_.config, *ops_));
}

std::vector<float> ModelRun::Logits(const std::vector<int32_t>& tokens) {
  ops::TokenBatch batch;
  AppendSequence(tokens, 0, -1, batch);
  for (int32_t r = 0; r < batch.num_rows(); ++r) batch.logit_rows.push_back(r);
  return RunBatch(batch, nullptr);
}

std::vector<float> ModelRun::RunBatch(const ops::TokenBatch& batch, const KvPool* kv) {
  const int64_t n = static_cast<int64_t>(batch.logit_rows.size()), vocab = model_.config.vocab;
  DeviceBuffer workspace =
      ValueOrDie(ops_->Allocate(decoder_->WorkspaceBytes(batch.num_rows(), n), "workspace"));
  const DeviceBuffer buffer = ValueOrDie(ops_->Allocate(n * vocab * SizeOf(DType::kF32), "logits"));
  const auto plan = ValueOrDie(ops_->PlanBatch(batch));
  const TensorView hidden = ValueOrDie(decoder_->Forward(model_.params, *plan, kv, workspace));
  const TensorView logits = View2D(buffer.data(), DType::kF32, n, vocab);
  CHECK_OK(decoder_->Logits(model_.params, hidden, logits));
  std::vector<float> host(n * vocab);
  CHECK_OK(ops_->Download(logits, host.data()));
  return host;
}

std::vector<int32_t> ModelRun::ArgMaxStep(const ops::TokenBatch& batch, const KvPool& kv) {
  const int64_t n = static_cast<int64_t>(batch.logit_rows.size()), vocab = model_.config.vocab;
  const std::vector<float> logits = RunBatch(batch, &kv);
  std::vector<int32_t> best;
  for (int64_t i = 0; i < n; ++i) {
    const float* row = logits.data() + i * vocab;
    best.push_back(static_cast<int32_t>(std::max_element(row, row + vocab) - row));
  }
  return best;
}

std::vector<std::vector<int32_t>> ModelRun::Greedy(const std::vector<std::vector<int32_t>>& prompts,
                                                   int num_tokens) {
  size_t longest = 0;
  for (const auto& prompt : prompts) longest = std::max(longest, prompt.size());
  const int32_t blocks_each =
      (static_cast<int32_t>(longest) + num_tokens + kBlockTokens - 1) / kBlockTokens;
  const int32_t n = static_cast<int32_t>(prompts.size());
  const KvPool kv =
      ValueOrDie(KvPool::Create(model_.config, int64_t{n} * blocks_each, kBlockTokens, *ops_));
  const auto slot = [&](int32_t i, int32_t position) {
    return i * blocks_each * kBlockTokens + position;
  };

  ops::TokenBatch prefill;
  prefill.block_tokens = kBlockTokens;
  for (int32_t i = 0; i < n; ++i) {
    AppendSequence(prompts[i], 0, -1, prefill);
    for (size_t p = 0; p < prompts[i].size(); ++p) {
      prefill.kv_slots.push_back(slot(i, static_cast<int32_t>(p)));
    }
    prefill.logit_rows.push_back(static_cast<int32_t>(prefill.num_rows()) - 1);
  }
  std::vector<int32_t> next = ArgMaxStep(prefill, kv);
  std::vector<std::vector<int32_t>> out(n);
  for (int step = 0;; ++step) {
    for (int32_t i = 0; i < n; ++i) out[i].push_back(next[i]);
    if (step + 1 == num_tokens) return out;
    ops::TokenBatch decode;
    decode.block_tokens = kBlockTokens;
    for (int32_t i = 0; i < n; ++i) {
      const int32_t length = static_cast<int32_t>(prompts[i].size()) + step;
      decode.context_nodes.push_back(
          {-1, length, static_cast<int32_t>(decode.context_blocks.size())});
      for (int32_t b = 0; b * kBlockTokens < length; ++b) {
        decode.context_blocks.push_back(i * blocks_each + b);
      }
      AppendSequence({next[i]}, length, i, decode);
      decode.kv_slots.push_back(slot(i, length));
      decode.logit_rows.push_back(i);
    }
    next = ArgMaxStep(decode, kv);
  }
}

const Parameters& ModelRun::GroupGradients(const GoldenArrays& golden) {
  trainer_ = ValueOrDie(Trainer::Create({}, model_, *decoder_, clock_));
  ForwardBackwardRequest request;
  request.loss.kind = LossConfig::Kind::kCrossEntropy;
  request.loss.aggregation = LossConfig::Aggregation::kSum;
  TrainGroup group{.prompt = golden.Tokens("group.prompt"), .samples = {}};
  const std::vector<float> advantages = golden.Floats("group.advantages");
  for (size_t i = 0; i < advantages.size(); ++i) {
    TrainSample sample;
    sample.tokens = golden.Tokens(absl::StrCat("group.response.", i));
    sample.advantages = {advantages[i]};
    group.samples.push_back(sample);
  }
  request.groups.push_back(group);
  const ForwardBackwardResult result = ValueOrDie(trainer_->ForwardBackward(request));
  const double want = golden.Floats("group.loss")[0];
  EXPECT_NEAR(result.loss, want, tolerance::kParity * std::abs(want));
  for (size_t i = 0; i < result.samples.size(); ++i) {
    const auto logprobs = golden.Floats(absl::StrCat("group.logprobs.", i));
    EXPECT_LT(RelativeError(result.samples[i].logprobs, logprobs), tolerance::kParity);
  }
  return trainer_->gradients();
}

void ExpectGreedyParity(ModelRun& run, const GoldenArrays& golden) {
  std::vector<std::vector<int32_t>> prompts, want;
  for (int i = 0; golden.Has(absl::StrCat("greedy.", i, ".prompt")); ++i) {
    prompts.push_back(golden.Tokens(absl::StrCat("greedy.", i, ".prompt")));
    want.push_back(golden.Tokens(absl::StrCat("greedy.", i, ".continuation")));
  }
  ASSERT_EQ(prompts.size(), 20u);
  EXPECT_EQ(run.Greedy(prompts, 32), want);
}

}  // namespace coppice
