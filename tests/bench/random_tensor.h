// Random contents for device tensors. Products are timed on these, never on zeros: those take so
// little power that a GPU runs them at a higher clock.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/tensor_view.h"
#include "kernels/ops/ops.h"

namespace coppice::bench {

// Fills a matrix with uniform numbers of deviation `scale`; rows repeat after a few million
// elements. Waits for the device.
absl::Status FillRandom(ops::Ops& ops, TensorView matrix, float scale, uint64_t seed);

}  // namespace coppice::bench
