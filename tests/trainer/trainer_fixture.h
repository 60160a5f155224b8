// A tiny model with a trainer over it, and random requests. Weights are larger than at
// initialisation so that attention, norms and ratios are far from trivial.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/base/log.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "kernels/ops/ops.h"
#include "tests/support/failing_ops.h"
#include "trainer/trainer.h"

namespace coppice {

constexpr float kWeightScale = 8;

inline ModelConfig TinyConfig(Architecture architecture, bool tied_head) {
  ModelConfig c;
  c.name = "tiny";
  c.architecture = architecture;
  c.num_layers = 2;
  c.hidden = 32;
  c.q_heads = 4;
  c.kv_heads = 2;
  c.head_dim = architecture == Architecture::kQwen3 ? 16 : 8;
  c.ffn = 48;
  c.vocab = 61;
  c.max_positions = 128;
  c.tied_head = tied_head;
  c.qkv_bias = architecture == Architecture::kQwen2;
  c.qk_norm = architecture == Architecture::kQwen3;
  return c;
}

inline std::string ArchitectureName(const ModelConfig& config) {
  switch (config.architecture) {
    case Architecture::kLlama:
      return "Llama";
    case Architecture::kQwen2:
      return "Qwen2";
    case Architecture::kQwen3:
      break;
  }
  return "Qwen3";
}

// Ops, model, decoder and trainer; one policy.
class TinyPolicy {
 public:
  explicit TinyPolicy(const ModelConfig& config, uint64_t seed = 1,
                      const Trainer::Options& options = {}) {
    SetMinLogSeverity(LogSeverity::kError);  // skipped updates are part of the tests
    ops_ = std::make_unique<FailingOps>(std::move(ops::CreateOps("cpu", 2)).value());
    model_ = std::move(RandomModel(config, seed, *ops_)).value();
    Perturb(seed);
    decoder_ = std::move(Decoder::Create(config, *ops_)).value();
    trainer_ = std::move(Trainer::Create(options, model_, *decoder_, clock_)).value();
  }

  Trainer& trainer() { return *trainer_; }
  Model& model() { return model_; }
  const Decoder& decoder() const { return *decoder_; }
  FailingOps& ops() { return *ops_; }
  const ModelConfig& config() const { return model_.config; }

  std::vector<float> Weights() const { return Flat(model_.params); }
  std::vector<float> Gradients() const { return Flat(trainer_->gradients()); }
  void SetWeight(int64_t index, float value) { model_.params.flat.f32()[index] = value; }
  // A pending gradient is dropped by an update that cannot change anything.
  void DropGradients() {
    if (!trainer_->has_pending_gradients()) return;
    const std::vector<float> weights = Weights();
    trainer_->gradients().flat.f32()[0] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(trainer_->OptimStep({}).value().skipped);
    EXPECT_EQ(weights, Weights());
  }

 private:
  static std::vector<float> Flat(const Parameters& p) {
    return {p.flat.f32(), p.flat.f32() + p.flat.num_elements()};
  }
  void Perturb(uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0, 0.2f);
    for (const NamedTensor& tensor : HfTensors(model_.config, model_.params)) {
      float* w = tensor.view.f32();
      for (int64_t i = 0; i < tensor.view.num_elements(); ++i) {
        w[i] = tensor.decay ? w[i] * kWeightScale : w[i] + normal(random);
      }
    }
  }

  SteadyClock clock_;
  std::unique_ptr<FailingOps> ops_;
  Model model_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<Trainer> trainer_;
};

// ---- Random requests

using Random = std::mt19937_64;

inline int64_t Uniform(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

inline std::vector<float> RandomFloats(Random& random, size_t n, float mean, float deviation) {
  std::normal_distribution<float> normal(mean, deviation);
  std::vector<float> values(n);
  for (float& v : values) v = normal(random);
  return values;
}

// Token sequences that are the paths of a random tree: runs of 1 to 5 tokens, up to `max_depth`
// deep, ends at any node.
class RandomTree {
 public:
  RandomTree(Random& random, int64_t vocab, int max_depth) : random_(random), vocab_(vocab) {
    Grow({}, max_depth);
  }
  const std::vector<std::vector<int32_t>>& paths() const { return paths_; }

 private:
  void Grow(std::vector<int32_t> path, int depth) {
    const int64_t run = Uniform(random_, 0, 2) == 0 ? 1 : Uniform(random_, 1, 5);
    for (int64_t i = 0; i < run; ++i) {
      path.push_back(static_cast<int32_t>(Uniform(random_, 0, vocab_ - 1)));
    }
    if (path.size() < 2 && depth <= 1) path.push_back(0);
    if (path.size() >= 2) paths_.push_back(path);
    if (depth <= 1) return;
    const int64_t children = Uniform(random_, path.size() < 2 ? 1 : 0, 3);
    for (int64_t c = 0; c < children; ++c) Grow(path, depth - 1);
  }

  Random& random_;
  int64_t vocab_;
  std::vector<std::vector<int32_t>> paths_;
};

// A path cut at a random place into prompt and response; all optional fields are random.
inline TrainSample RandomSample(Random& random, std::vector<int32_t> response) {
  TrainSample sample;
  const size_t n = response.size();
  sample.tokens = std::move(response);
  const float mean = -4.1f;  // near the log-prob of a uniform guess
  if (Uniform(random, 0, 2) != 0) sample.old_logprobs = RandomFloats(random, n, mean, 1);
  sample.sampler_logprobs = RandomFloats(random, n, mean, 1);
  sample.ref_logprobs = RandomFloats(random, n, mean, 1);
  if (Uniform(random, 0, 1) == 0) {
    for (size_t t = 0; t < n; ++t) {
      sample.loss_mask.push_back(Uniform(random, 0, 3) == 0 ? 0.0f : 1.0f);
    }
  }
  sample.weight = Uniform(random, 0, 3) == 0 ? 0.5f : 1.0f;
  return sample;
}

inline LossConfig RandomLoss(Random& random) {
  LossConfig loss;
  loss.kind = static_cast<LossConfig::Kind>(Uniform(random, 0, 7));
  loss.clip_low = 0.3f;
  loss.clip_high = 0.4f;
  if (Uniform(random, 0, 1) == 0) loss.clip_dual = 2.5f;
  loss.kl = static_cast<LossConfig::KlEstimator>(Uniform(random, 0, 3));
  loss.kl_coef = loss.kl == LossConfig::KlEstimator::kNone ? 0 : 0.1f;
  loss.entropy_coef = Uniform(random, 0, 1) == 0 ? 0.05f : 0;
  loss.temperature = Uniform(random, 0, 1) == 0 ? 0.8f : 1.0f;
  loss.aggregation = static_cast<LossConfig::Aggregation>(Uniform(random, 0, 4));
  if (loss.aggregation == LossConfig::Aggregation::kConstant) loss.denominator = 7;
  if (Uniform(random, 0, 1) == 0) loss.importance_cap = 2;
  return loss;
}

// Random groups over the paths of one random tree: equal prompts occur in several groups, groups of
// one occur, and samples of a group need not share anything beyond the group's prompt.
inline ForwardBackwardRequest RandomRequest(Random& random, int64_t vocab) {
  ForwardBackwardRequest request;
  request.loss = RandomLoss(random);
  const int max_depth = static_cast<int>(Uniform(random, 1, 5));
  const RandomTree tree(random, vocab, max_depth);
  for (std::vector<int32_t> path : tree.paths()) {
    const int64_t cut = Uniform(random, 1, static_cast<int64_t>(path.size()) - 1);
    TrainSample sample = RandomSample(random, {path.begin() + cut, path.end()});
    path.resize(cut);
    TrainGroup* group = nullptr;
    for (TrainGroup& g : request.groups) {
      if (g.prompt == path && Uniform(random, 0, 1) == 0) group = &g;
    }
    if (group == nullptr) {
      request.groups.push_back({.prompt = path});
      group = &request.groups.back();
    }
    group->samples.push_back(std::move(sample));
  }
  for (TrainGroup& group : request.groups) {
    for (TrainSample& sample : group.samples) {
      const size_t n = Uniform(random, 0, 1) == 0 ? 1 : sample.tokens.size();
      sample.advantages = RandomFloats(random, n, 0.2f, 1);
    }
  }
  return request;
}

// ---- Comparison

// All tensors of the arena by name, q, k, v and their biases merged as they are stored: on its own,
// the gradient of a key bias would vanish but for RoPE (softmax ignores a common shift), and its
// norm would measure rounding.
inline std::vector<std::pair<std::string, TensorView>> ArenaTensors(const Parameters& params) {
  std::vector<std::pair<std::string, TensorView>> tensors = {
      {"embedding", params.embedding}, {"final_norm", params.final_norm}, {"head", params.head}};
  for (size_t l = 0; l < params.layers.size(); ++l) {
    const LayerParameters& p = params.layers[l];
    const std::string layer = "layer " + std::to_string(l) + " ";
    for (const auto& [name, view] : {std::pair("attn_norm", p.attn_norm),
                                     {"qkv", p.qkv},
                                     {"qkv_bias", p.qkv_bias},
                                     {"q_norm", p.q_norm},
                                     {"k_norm", p.k_norm},
                                     {"o", p.o},
                                     {"mlp_norm", p.mlp_norm},
                                     {"gate_up", p.gate_up},
                                     {"down", p.down}}) {
      if (view.present()) tensors.emplace_back(layer + name, view);
    }
  }
  return tensors;
}

// |got - want| <= limit * |want| in the Euclidean norm, for each tensor of the arena.
inline void ExpectTensorsNear(const ModelConfig& config, const std::vector<float>& got,
                              const std::vector<double>& want, double limit,
                              const std::string& what) {
  std::vector<float> base(NumParameterElements(config));
  for (const auto& [name, view] : ArenaTensors(MapParameters(config, base.data(), DType::kF32))) {
    const int64_t begin = view.f32() - base.data();
    double error = 0, norm = 0;
    for (int64_t i = begin; i < begin + view.num_elements(); ++i) {
      error += (got[i] - want[i]) * (got[i] - want[i]);
      norm += want[i] * want[i];
    }
    EXPECT_LE(std::sqrt(error), limit * std::sqrt(norm) + 1e-12) << what << ", " << name;
  }
}

}  // namespace coppice
