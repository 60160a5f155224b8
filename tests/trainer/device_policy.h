// DevicePolicy: a tiny policy with a trainer over it, with shapes that a GPU has kernels for.
#pragma once

#include <memory>
#include <utility>

#include "kernels/base/clock.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "tests/support/test_ops.h"
#include "trainer/trainer.h"

namespace coppice {

class DevicePolicy {
 public:
  static constexpr int32_t kVocab = 264;

  DevicePolicy(const char* device, uint64_t seed)
      : DevicePolicy(CreateTestOps(device, 2).value(), seed) {}
  DevicePolicy(std::unique_ptr<ops::Ops> device, uint64_t seed) : ops_(std::move(device)) {
    ModelConfig c;
    c.name = "tiny";
    c.num_layers = 2;
    c.hidden = 128;
    c.q_heads = 2;
    c.kv_heads = 1;
    c.head_dim = 64;
    c.ffn = 192;
    c.vocab = kVocab;
    c.max_positions = 256;
    model_ = RandomModel(c, seed, *ops_).value();
    decoder_ = Decoder::Create(c, *ops_).value();
    trainer_ = Trainer::Create({}, model_, *decoder_, clock_).value();
  }

  Trainer& trainer() { return *trainer_; }
  Model& model() { return model_; }

 private:
  std::unique_ptr<ops::Ops> ops_;
  SteadyClock clock_;
  Model model_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<Trainer> trainer_;
};

}  // namespace coppice
