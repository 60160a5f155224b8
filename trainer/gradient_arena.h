// GradientArena: gradients of all parameters, times S of gradient_scale.h. The matrices of layers,
// nine tenths of a model and what every row adds to at once, are f32, or bf16 to halve their memory
// and traffic: each tree that runs then rounds its sum once more, a relative 2^-9 of what is there.
// Norms, biases, embedding and head are f32 always: small, or summed in many pieces.
//
// Owner and thread: the trainer on the engine thread.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/device.h"
#include "kernels/model/model_config.h"
#include "kernels/model/parameters.h"
#include "kernels/ops/ops.h"

namespace coppice {

class GradientArena {
 public:
  // Gradients of a run of consecutive elements of the flat arena of parameters.
  struct Slice {
    int64_t begin = 0;
    TensorView values;  // [n]
  };

  static int64_t SizeBytes(const ModelConfig& config, DType matrices);
  // `matrices`: kF32 or kBF16. RESOURCE_EXHAUSTED of the device's allocator.
  static absl::StatusOr<GradientArena> Create(const ModelConfig& config, DType matrices,
                                              ops::Ops& ops);

  bool present() const { return !slices_.empty(); }
  // Mapped like the weights. `flat` is absent where types differ.
  const Parameters& parameters() const { return parameters_; }
  // All of the arena, ascending.
  const std::vector<Slice>& slices() const { return slices_; }

  absl::Status Zero(ops::Ops& ops) const;
  absl::StatusOr<double> SumSquares(ops::Ops& ops) const;

 private:
  // Lays `parameters_` and `slices_` out over both buffers; returns the elements of each.
  struct Elements {
    int64_t f32 = 0, matrices = 0;
  };
  Elements LayOut(const ModelConfig& config, DType matrices);

  DeviceBuffer buffer_, matrices_buffer_;
  Parameters parameters_;
  std::vector<Slice> slices_;
  std::vector<TensorView> flats_;  // of each buffer
};

}  // namespace coppice
