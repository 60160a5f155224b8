#include "kernels/cuda/timeline.h"

#include "kernels/base/status_macros.h"

namespace coppice::cuda {

CudaTimeline::~CudaTimeline() {
  for (const cudaEvent_t event : events_) cudaEventDestroy(event);
}

absl::Status CudaTimeline::Mark() {
  if (num_marks_ == events_.size()) {
    cudaEvent_t event = nullptr;
    RETURN_IF_ERROR(context_.Check(cudaEventCreate(&event), "event create"));
    events_.push_back(event);
  }
  return context_.Check(cudaEventRecord(events_[num_marks_++], context_.stream()), "event record");
}

// Differences of neighbours are added: an event's time is a float of milliseconds.
absl::StatusOr<std::vector<double>> CudaTimeline::Take() {
  RETURN_IF_ERROR(context_.Synchronize());
  std::vector<double> seconds(num_marks_, 0.0);
  for (size_t i = 1; i < num_marks_; ++i) {
    float ms = 0;
    RETURN_IF_ERROR(
        context_.Check(cudaEventElapsedTime(&ms, events_[i - 1], events_[i]), "event elapsed"));
    seconds[i] = seconds[i - 1] + 1e-3 * static_cast<double>(ms);
  }
  num_marks_ = 0;
  return seconds;
}

}  // namespace coppice::cuda
