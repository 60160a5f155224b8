// Trainer: forward, loss, backward through one shared token tree, and the update of the policy.
//
// Owner and thread: the engine thread, alone; the weights it updates are the very tensors that
// generation reads (P1). Gradient contract: ForwardBackward adds to the gradient arena until
// OptimStep consumes it. Version contract: OptimStep (and LoadCheckpoint) are the only places that
// change policy_version().
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/clock.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "trainer/train_types.h"

namespace coppice {

class Trainer {
 public:
  struct Options {
    // Unique tokens in one pass; more is split into micro-batches of whole groups, and a group with
    // more into its prompt and micro-batches of its branches.
    int64_t max_rows = 16384;
    // Memory for activations; decides what is retained for backward. 0 = half of a CPU's free
    // memory at Create; on a GPU what is free beside gradients and optimizer.
    int64_t activation_bytes = 0;
    // Of the gradients of layers' matrices: f32, or bf16 for half of their memory and less
    // precision (gradient_arena.h).
    DType gradient_dtype = DType::kF32;
    // Gradients are scaled (gradient_scale.h) also where the device computes in another type than
    // f16, which needs it: same updates.
    bool scale_gradients = false;
    // Attention over context is much slower than over the rows of a tree, as with --deterministic:
    // nothing is cut to save work, and no stem (trainer/stem.h) is taken.
    bool slow_context = false;
    // false: every sequence runs on its own, the baseline of benchmarks.
    bool share_prefixes = true;
    // Where the engine checkpoints durable steps; empty = durable is refused.
    std::string step_log_dir;
  };
  // Borrows model, decoder and clock. INVALID_ARGUMENT or RESOURCE_EXHAUSTED for options that
  // cannot work. Gradients are allocated at the first ForwardBackward, optimizer state at the first
  // OptimStep.
  static absl::StatusOr<std::unique_ptr<Trainer>> Create(const Options& options, Model& model,
                                                         const Decoder& decoder,
                                                         const Clock& clock);
  virtual ~Trainer() = default;

  // INVALID_ARGUMENT with group, sample and field for bad input, RESOURCE_EXHAUSTED for
  // activations, which are reserved for all passes before the first one runs: then nothing has
  // changed. After a device error (INTERNAL, or RESOURCE_EXHAUSTED for the scratch of an op, which
  // grows as it runs) all pending gradients are dropped.
  virtual absl::StatusOr<ForwardBackwardResult> ForwardBackward(
      const ForwardBackwardRequest& request) = 0;
  // Clips, updates, drops gradients, increments the version. A non-finite norm skips the update
  // (gradients are dropped). FAILED_PRECONDITION without pending gradients.
  virtual absl::StatusOr<OptimStepResult> OptimStep(const AdamConfig& config) = 0;
  // Forgets pending gradients; the device's errors.
  virtual absl::Status DropGradients() = 0;
  // Log-probs of every response token, same code path as ForwardBackward's forward.
  // FAILED_PRECONDITION with group and sample if one is not finite.
  virtual absl::StatusOr<std::vector<SampleResult>> Score(const std::vector<TrainGroup>& groups,
                                                          float temperature) = 0;

  virtual PolicyVersion policy_version() const = 0;
  virtual bool has_pending_gradients() const = 0;
  virtual bool has_optimizer_state() const = 0;
  // gradient_scale() times the gradients, mapped like the weights, `flat` if all are f32; for tests
  // and parity. Hold something while gradients are pending.
  virtual const Parameters& gradients() const = 0;
  // A power of two (gradient_scale.h).
  virtual double gradient_scale() const = 0;

  // Weights, optimizer, version; temp directory, fsync, rename. `directory` must not exist or be a
  // former checkpoint. FAILED_PRECONDITION with pending gradients, which a checkpoint does not
  // hold.
  virtual absl::Status SaveCheckpoint(absl::string_view directory) = 0;
  // Bit-equal resume; drops pending gradients. The version becomes the checkpoint's: what was
  // cached under other weights must be forgotten by the caller. NOT_FOUND, DATA_LOSS,
  // INVALID_ARGUMENT (another model's shape, or a weight beyond f16), UNIMPLEMENTED (dtype),
  // RESOURCE_EXHAUSTED (optimizer): then nothing has changed, as all of it is found before the
  // first weight is written. A device error (INTERNAL) while weights are written leaves them mixed:
  // the caller must stop.
  virtual absl::Status LoadCheckpoint(absl::string_view directory) = 0;
};

}  // namespace coppice
