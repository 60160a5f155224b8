// A model with random weights, its decoder and a KV pool: what the model benchmarks run on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/model/decoder.h"
#include "kernels/model/kv_pool.h"
#include "kernels/model/model_loader.h"
#include "kernels/ops/ops.h"
#include "kernels/ops/profiled_ops.h"
#include "tests/bench/options.h"

namespace coppice::bench {

// As the options name it.
absl::StatusOr<std::unique_ptr<ops::Ops>> OpenDevice(const Options& options);

class BenchModel {
 public:
  static absl::StatusOr<std::unique_ptr<BenchModel>> Create(const Options& options);

  ops::Ops& ops() { return *ops_; }
  ops::ProfiledOps* profiled_ops() { return profiled_ops_; }  // null without options.phases
  Model& model() { return model_; }
  const Decoder& decoder() const { return *decoder_; }
  const ModelConfig& config() const { return model_.config; }

  std::vector<int32_t> RandomTokens(int64_t n, uint64_t seed) const;
  // Runs a batch and returns logits [head_rows, vocab] f32 on the host. `pool` may be null.
  absl::StatusOr<std::vector<float>> Logits(const ops::TokenBatch& batch, const KvPool* pool);

 private:
  std::unique_ptr<ops::Ops> ops_;
  ops::ProfiledOps* profiled_ops_ = nullptr;  // ops_ itself
  Model model_;
  std::unique_ptr<Decoder> decoder_;
};

// The decoder's buffers for one batch, ready to be run again and again.
class PlannedBatch {
 public:
  static absl::StatusOr<PlannedBatch> Create(BenchModel& model, const ops::TokenBatch& batch);
  // Forward and logits. `logits()` is valid after Synchronize.
  absl::Status Run(const KvPool* pool);
  // Forward, logits and greedy sampling of every head row.
  absl::Status RunAndSample(const KvPool* pool);
  TensorView logits() const { return logits_; }  // [head_rows, vocab] f32

 private:
  BenchModel* model_ = nullptr;
  std::unique_ptr<ops::BatchPlan> plan_;
  DeviceBuffer workspace_, logits_buffer_;
  TensorView logits_;
  std::vector<ops::SamplingRow> sampling_;
  std::vector<int32_t> tokens_;
  std::vector<float> raw_logprobs_, sampled_logprobs_;
};

// Largest difference between a and b, relative to the largest value of a.
double RelativeError(const std::vector<float>& a, const std::vector<float>& b);
// What two ways to the same logits may differ by on the model's device.
double ModelTolerance(BenchModel& model);

}  // namespace coppice::bench
