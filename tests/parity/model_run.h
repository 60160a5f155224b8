// Runs a loaded model for parity tests: all logits of a sequence, greedy continuations of many
// prompts in one batch through the KV pool, and the gradients of one group.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "tests/parity/golden.h"
#include "trainer/trainer.h"

namespace coppice {

class ModelRun {
 public:
  // `device` as tests/support/test_ops.h has it.
  explicit ModelRun(const std::string& path, const std::string& device = "cpu");

  Model& model() { return model_; }
  // [tokens, vocab] row-major: what each position predicts.
  std::vector<float> Logits(const std::vector<int32_t>& tokens);
  // The `num_tokens` most likely next tokens of each prompt, decoded as one batch.
  std::vector<std::vector<int32_t>> Greedy(const std::vector<std::vector<int32_t>>& prompts,
                                           int num_tokens);
  // Gradients of -sum advantage * log-prob over the golden group; the result's loss and log-probs
  // are checked against it.
  const Parameters& GroupGradients(const GoldenArrays& golden);

 private:
  // [logit rows, vocab] on the host
  std::vector<float> RunBatch(const ops::TokenBatch& batch, const KvPool* kv);
  std::vector<int32_t> ArgMaxStep(const ops::TokenBatch& batch, const KvPool& kv);

  std::unique_ptr<ops::Ops> ops_;
  Model model_;
  std::unique_ptr<Decoder> decoder_;
  SteadyClock clock_;
  std::unique_ptr<Trainer> trainer_;
};

// The greedy prompts and continuations of a golden file equal the model's.
void ExpectGreedyParity(ModelRun& run, const GoldenArrays& golden);

}  // namespace coppice
