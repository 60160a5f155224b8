// What the device computes in: what --compute_dtype says, or what suits the model.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/model/model_loader.h"
#include "server/config.h"

namespace coppice {

// f32 on the cpu; what the flag says; for auto the checkpoint's own type (ComputeTypeOf, whose
// errors these are), bf16 for random weights.
absl::StatusOr<ComputeType> ChooseComputeType(const Config& config);

// INVALID_ARGUMENT if --gradient_dtype does not go with it.
absl::Status CheckGradientType(const Config& config, const ComputeType& compute);

}  // namespace coppice
