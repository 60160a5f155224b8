// MemoryPlan: what the daemon will hold on the device, computed before anything large is allocated
// and printed at start. Pure arithmetic on flags and model shape.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/base/dtype.h"
#include "kernels/model/model_config.h"
#include "server/config.h"

namespace coppice {

struct MemoryPlan {
  int64_t max_context = 0;  // resolved
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;
  // Name and bytes: weights, kv_blocks, workspace; gradients and optimizer from the first training
  // step on.
  std::vector<std::pair<std::string, int64_t>> regions;

  int64_t total_bytes() const;
  std::string ToString() const;  // one line, MiB
};

// INVALID_ARGUMENT naming the flags if the KV blocks cannot hold one full context, or a context is
// longer than the model's.
absl::StatusOr<MemoryPlan> PlanMemory(const Config& config, const ModelConfig& model, DType dtype,
                                      int64_t workspace_bytes);

}  // namespace coppice
