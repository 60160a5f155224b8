// CudaTimeline: events on the context's stream. Events are made when first needed and kept.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/context.h"
#include "kernels/ops/ops.h"

namespace coppice::cuda {

class CudaTimeline final : public ops::Timeline {
 public:
  explicit CudaTimeline(Context& context) : context_(context) {}  // borrowed
  ~CudaTimeline() override;

  absl::Status Mark() override;
  absl::StatusOr<std::vector<double>> Take() override;

 private:
  Context& context_;
  std::vector<cudaEvent_t> events_;
  size_t num_marks_ = 0;
};

}  // namespace coppice::cuda
