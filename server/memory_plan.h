// MemoryPlan: what the daemon will hold on the device, computed before anything large is allocated
// and printed at start. Pure arithmetic on flags, model shape and free bytes.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/model/model_config.h"
#include "kernels/ops/ops.h"
#include "server/config.h"

namespace coppice {

struct MemoryPlan {
  int64_t max_context = 0;  // resolved
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;
  // For one training pass. On the CPU 0 = the trainer's own choice; on a GPU at least an eighth of
  // what weights, workspace and KV leave, which may be more than there is.
  int64_t activation_bytes = 0;
  // Name and bytes: weights, kv_blocks, workspace, and the device's scratch as it may grow; from
  // the first training step on gradients, optimizer and activations.
  std::vector<std::pair<std::string, int64_t>> regions;

  int64_t total_bytes() const;
  std::string ToString() const;  // one line, MiB
};

// `device`: with nothing of ours on it yet. INVALID_ARGUMENT naming the flags if the KV blocks
// cannot hold one full context, a context is longer than the model's, or --kv_fraction is asked of
// a device that the rest fills.
absl::StatusOr<MemoryPlan> PlanMemory(const Config& config, const ModelConfig& model,
                                      const ops::DeviceInfo& device, int64_t workspace_bytes);

}  // namespace coppice
