// Checkpoints: one directory that holds a policy, and from which training resumes bit for bit.
//   config.json, model.safetensors   as Hugging Face transformers reads them; f32 masters once a
//   device that computes in 16 bits has trained, so that any device resumes from them exactly
//   optimizer.safetensors            moments by tensor name, "m." and "v."; absent before the first
//   optimizer step
//   checkpoint.json                  format, policy version, optimizer steps, what the gradient
//   scale has learnt if anything, size and SHA-256 of every other file
// Sampling is counter-based, so there is no random state to keep.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/ids.h"
#include "kernels/model/model_config.h"
#include "kernels/model/parameters.h"
#include "kernels/model/tensor_source.h"
#include "trainer/atomic_directory.h"
#include "trainer/gradient_scale.h"
#include "trainer/optimizer.h"

namespace coppice {

// What a checkpoint holds. Borrowed.
struct CheckpointView {
  const ModelConfig& config;
  const Parameters& params;
  const Optimizer* optimizer;  // null before the first step
  PolicyVersion version;
  GradientScale::History scale = {};
};

// Writes all files and puts the directory in place atomically. FAILED_PRECONDITION if `directory`
// exists and is not a checkpoint; the file system's errors. `boundary`: see atomic_directory.h.
absl::Status WriteCheckpoint(const CheckpointView& view, absl::string_view directory, ops::Ops& ops,
                             WriteBoundary boundary = {});

// A checkpoint that was opened and found whole: sizes, checksums, names and shapes are checked
// before anything is read.
class CheckpointReader {
 public:
  // NOT_FOUND (no checkpoint.json), DATA_LOSS (file, want, got), INVALID_ARGUMENT (another model:
  // tensor, want, got).
  static absl::StatusOr<std::unique_ptr<CheckpointReader>> Open(const ModelConfig& config,
                                                                absl::string_view directory);

  PolicyVersion version() const { return version_; }
  const GradientScale::History& scale() const { return scale_; }
  bool has_optimizer() const { return optimizer_ != nullptr; }
  // `optimizer` (null if there is none) gets what 16-bit weights leave of their masters.
  // INVALID_ARGUMENT, before anything is written, if a weight is larger than its type can say: in
  // f16 all weights are read twice.
  absl::Status ReadWeights(const Parameters& params, const Optimizer* optimizer,
                           ops::Ops& ops) const;
  // REQUIRES: has_optimizer().
  absl::Status ReadOptimizer(Optimizer& optimizer, ops::Ops& ops) const;

 private:
  explicit CheckpointReader(const ModelConfig& config) : config_(config) {}

  ModelConfig config_;
  PolicyVersion version_{0};
  int64_t optimizer_steps_ = 0;
  GradientScale::History scale_;
  std::unique_ptr<TensorSource> weights_;
  std::unique_ptr<TensorSource> optimizer_;
};

}  // namespace coppice
