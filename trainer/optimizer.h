// Optimizer: AdamW over the flat parameter arena, with global-norm clipping. Owns the moments
// (f32), the step count and, where weights have 16 bits, the 16 that complete them to f32 masters.
// Weight decay applies to matrices only. Owner and thread: the trainer on the engine thread.
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/base/device.h"
#include "kernels/model/model_config.h"
#include "kernels/model/parameters.h"
#include "kernels/ops/ops.h"
#include "trainer/gradient_arena.h"
#include "trainer/train_types.h"

namespace coppice {

class Optimizer {
 public:
  // Two moments of the size of the gradients; zero. RESOURCE_EXHAUSTED.
  static absl::StatusOr<Optimizer> Create(const ModelConfig& config, const Parameters& params,
                                          ops::Ops& ops);

  struct Outcome {
    double grad_norm = 0;  // before clipping, of grads / scale
    bool updated = false;  // false: the norm was not finite and nothing changed
  };
  // params -= AdamW(grads / scale, clipped to config.grad_clip_norm). One pass for the norm, one
  // for the update. `scale`: a power of two (gradient_scale.h).
  absl::StatusOr<Outcome> Step(const AdamConfig& config, const Parameters& params,
                               const GradientArena& grads, double scale, ops::Ops& ops);

  int64_t num_steps() const { return num_steps_; }
  void set_num_steps(int64_t n) { num_steps_ = n; }
  TensorView m() const { return m_; }  // [params] f32
  TensorView v() const { return v_; }  // [params] f32
  // [params] 16-bit, absent where params are f32
  TensorView remainder() const { return remainder_; }

 private:
  DeviceBuffer m_buffer_, v_buffer_, remainder_buffer_, decay_buffer_;
  TensorView m_, v_;
  TensorView remainder_;
  TensorView decay_mask_;  // [params / 64] u8
  int64_t num_steps_ = 0;
};

}  // namespace coppice
