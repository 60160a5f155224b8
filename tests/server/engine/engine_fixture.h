// An Engine over a tiny random model, driven step by step, and a sink that records what it is told.
// Weights are larger than at initialisation, so that a wrong key or value changes the tokens.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/log.h"
#include "kernels/model/arena_fill.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "kernels/ops/ops.h"
#include "server/engine/engine.h"
#include "server/metrics/metrics.h"
#include "tests/server/engine/overlap_default.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/failing_ops.h"
#include "tests/support/fake_clock.h"

namespace coppice {

// Everything that one request was told, checked against the promises of GenerateSink.
class RecordingSink final : public GenerateSink {
 public:
  bool HasRoom() const override { return room; }
  bool Cancelled() const override { return cancelled; }
  void OnStarted(uint64_t s, const Usage& u, PolicyVersion) override {
    EXPECT_FALSE(started || done);
    started = true;
    seed = s;
    prompt_usage = u;
    ExpectUsageAddsUp(u);
  }
  void OnChunk(TokenChunk chunk) override {
    EXPECT_TRUE(started && !done);
    EXPECT_TRUE(room || kOverlapByDefault) << "a slow reader was sent more";
    Grow(chunk.sample);
    EXPECT_FALSE(finished[chunk.sample].has_value());
    auto& t = tokens[chunk.sample];
    t.insert(t.end(), chunk.token_ids.begin(), chunk.token_ids.end());
    auto& l = logprobs[chunk.sample];
    l.insert(l.end(), chunk.logprobs.begin(), chunk.logprobs.end());
    texts[chunk.sample] += chunk.text;
    for (size_t i = 0; i < chunk.token_ids.size(); ++i) {
      versions[chunk.sample].push_back(Raw(chunk.policy_version));
    }
    chunks.push_back(std::move(chunk));
  }
  void OnSampleFinished(const SampleFinished& f) override {
    EXPECT_TRUE(started && !done);
    Grow(f.sample);
    EXPECT_FALSE(finished[f.sample].has_value());
    EXPECT_EQ(f.num_tokens, static_cast<int32_t>(tokens[f.sample].size()));
    finished[f.sample] = f.reason;
  }
  void OnDone(const absl::Status& s, const Usage& u, const std::string& rollout,
              PolicyVersion v) override {
    EXPECT_FALSE(done);
    done = true;
    status = s;
    usage = u;
    rollout_id = rollout;
    version = Raw(v);
    if (started) ExpectUsageAddsUp(u);
  }

  static void ExpectUsageAddsUp(const Usage& u) {
    EXPECT_EQ(u.prompt_tokens, u.cached_device_tokens + u.joined_tokens + u.computed_tokens);
    EXPECT_GE(u.joined_tokens, 0);
  }
  void Grow(int32_t sample) {
    const size_t n = static_cast<size_t>(sample) + 1;
    if (tokens.size() >= n) return;
    tokens.resize(n);
    logprobs.resize(n);
    texts.resize(n);
    versions.resize(n);
    finished.resize(n);
  }

  bool room = true, cancelled = false;
  bool started = false, done = false;
  uint64_t seed = 0, version = 0;
  Usage prompt_usage, usage;
  absl::Status status;
  std::string rollout_id;
  std::vector<TokenChunk> chunks;
  std::vector<std::vector<int32_t>> tokens;
  std::vector<std::vector<float>> logprobs;
  std::vector<std::vector<uint64_t>> versions;
  std::vector<std::string> texts;
  std::vector<std::optional<FinishReason>> finished;
};

// Where a Reply's answer goes.
template <typename T>
struct Answer {
  std::shared_ptr<std::optional<absl::StatusOr<T>>> value =
      std::make_shared<std::optional<absl::StatusOr<T>>>();
  Reply<T> reply() const {
    return [v = value](absl::StatusOr<T> answer) {
      EXPECT_FALSE(v->has_value()) << "answered twice";
      *v = std::move(answer);
    };
  }
  bool has() const { return value->has_value(); }
  const absl::StatusOr<T>& get() const { return value->value(); }
};

inline ModelConfig TinyEngineModel() {
  ModelConfig c;
  c.name = "tiny";
  c.num_layers = 2;
  c.hidden = 32;
  c.q_heads = 4;
  c.kv_heads = 2;
  c.head_dim = 8;
  c.ffn = 48;
  c.vocab = 257;
  c.max_positions = 2048;
  return c;
}

// The same with shapes that a GPU has kernels for.
inline ModelConfig TinyDeviceModel() {
  ModelConfig c = TinyEngineModel();
  c.hidden = 128;
  c.head_dim = 64;
  c.ffn = 192;
  c.vocab = 264;
  return c;
}

// One policy and one engine over it.
class EngineUnderTest {
 public:
  explicit EngineUnderTest(EngineOptions options = {}, ModelConfig config = TinyEngineModel())
      : EngineUnderTest(options, config, ops::CreateOps("cpu", 1).value()) {}
  EngineUnderTest(EngineOptions options, const ModelConfig& config,
                  std::unique_ptr<ops::Ops> device) {
    SetMinLogSeverity(LogSeverity::kError);
    ops_ = std::make_unique<FailingOps>(std::move(device));
    model_ = std::move(RandomModel(config, 7, *ops_)).value();
    model_.tokenizer = std::make_unique<ByteTokenizer>();
    Perturb();
    decoder_ = std::move(Decoder::Create(config, *ops_)).value();
    options.overlap |= kOverlapByDefault;
    if (options.num_blocks == 0) options.num_blocks = 512;
    if (options.seed == 0) options.seed = 99;
    engine_ = std::move(Engine::Create(options, model_, *decoder_, metrics_, clock_)).value();
  }

  Engine& engine() { return *engine_; }
  Metrics& metrics() { return metrics_; }
  FakeClock& clock() { return clock_; }
  FailingOps& device() { return *ops_; }

  std::shared_ptr<RecordingSink> Submit(GenerateRequest request) {
    auto sink = std::make_shared<RecordingSink>();
    const absl::Status status = engine_->Submit(std::move(request), sink);
    EXPECT_TRUE(status.ok()) << status;
    return sink;
  }
  // Steps until nothing happens.
  void RunAll() {
    for (int i = 0; engine_->StepForTest(); ++i) ASSERT_LT(i, 100000) << "the engine does not end";
  }
  void Steps(int n) {
    for (int i = 0; i < n; ++i) engine_->StepForTest();
  }
  std::shared_ptr<RecordingSink> Generate(GenerateRequest request) {
    auto sink = Submit(std::move(request));
    RunAll();
    EXPECT_TRUE(sink->done);
    return sink;
  }
  EngineStatus Status() {
    Answer<EngineStatus> answer;
    engine_->GetStatus(answer.reply());
    engine_->StepForTest();
    return answer.get().value();
  }
  absl::StatusOr<TrainStepResult> TrainStep(TrainStepRequest request) {
    Answer<TrainStepResult> answer;
    engine_->TrainStep(std::move(request), answer.reply());
    RunAll();
    return answer.get();
  }
  // What reads `token` from now on has logits that are no numbers.
  void SpoilToken(int32_t token) {
    const TensorView row = model_.params.embedding.Rows(token, token + 1);
    const std::string nans(row.num_bytes(), '\xff');  // in every type
    ASSERT_TRUE(ops_->Upload(nans.data(), row).ok());
    ASSERT_TRUE(ops_->Synchronize().ok());
  }
  // Nothing runs, so nothing is leased.
  void ExpectNothingLeaked() {
    const EngineStatus status = Status();
    EXPECT_EQ(status.running_samples, 0);
    EXPECT_EQ(status.cache.leased_blocks, 0);
    EXPECT_EQ(status.cache.free_blocks + status.cache.cached_only_blocks,
              status.cache.total_blocks);
  }

 private:
  void Perturb() {
    const auto host_ops = ops::CreateOps("cpu", 1).value();
    const Model host = RandomModel(model_.config, 7, *host_ops).value();
    const std::vector<NamedTensor> tensors = HfTensors(host.config, host.params);
    std::mt19937_64 random(5);
    std::normal_distribution<float> normal(0, 0.2f);
    for (const NamedTensor& tensor : tensors) {
      float* w = tensor.view.f32();
      for (int64_t i = 0; i < tensor.view.num_elements(); ++i) {
        w[i] = tensor.decay ? w[i] * 10 : w[i] + normal(random);
      }
    }
    const auto rows = [&tensors](size_t index, int64_t begin, int64_t end, float* out) {
      const TensorView& view = tensors[index].view;
      std::copy(view.f32() + begin * view.stride[0], view.f32() + end * view.stride[0], out);
      return absl::OkStatus();
    };
    ASSERT_TRUE(FillTensors(HfTensors(model_.config, model_.params), rows, *ops_).ok());
  }

  FakeClock clock_;
  Metrics metrics_;
  std::unique_ptr<FailingOps> ops_;
  Model model_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<Engine> engine_;
};

inline std::vector<int32_t> RandomPrompt(int64_t length, uint64_t seed, int32_t vocab = 257) {
  std::mt19937_64 random(seed);
  std::uniform_int_distribution<int32_t> token(0, vocab - 1);
  std::vector<int32_t> prompt(length);
  for (int32_t& t : prompt) t = token(random);
  return prompt;
}

inline GenerateRequest Request(std::vector<int32_t> prompt, int32_t max_tokens, int32_t n = 1,
                               uint64_t seed = 11) {
  GenerateRequest request;
  request.prompt = std::move(prompt);
  request.n = n;
  request.sampling.max_tokens = max_tokens;
  request.sampling.seed = seed;
  return request;
}

// A policy-gradient step over given tokens, or over a rollout.
inline TrainStepRequest StepOnTokens(std::string step_id) {
  TrainStepRequest step;
  step.step_id = std::move(step_id);
  TrainSample sample;
  sample.tokens = {3, 1, 4, 1, 5};
  sample.advantages = {1};
  step.batch.groups.push_back({.prompt = {2, 7, 1, 8}, .samples = {sample}});
  step.optim.learning_rate = 0.05f;
  return step;
}

inline TrainStepRequest StepOnRollout(std::string step_id, const std::string& rollout_id,
                                      int32_t samples) {
  TrainStepRequest step;
  step.step_id = std::move(step_id);
  step.batch.groups.resize(1);
  step.rollout_ids = {rollout_id};
  step.rollout_samples.resize(1);
  for (int32_t i = 0; i < samples; ++i) {
    TrainSample sample;
    sample.reward = static_cast<float>(i);
    step.batch.groups[0].samples.push_back(sample);
    step.rollout_samples[0].push_back(i);
  }
  step.batch.loss.advantage = LossConfig::Advantage::kGroupNormalized;
  step.optim.learning_rate = 0.05f;
  return step;
}

}  // namespace coppice
