#include "server/memory_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/kv_pool.h"
#include "kernels/model/parameters.h"
#include "trainer/gradient_arena.h"

namespace coppice {
namespace {

constexpr int64_t kDefaultContexts = 16;
constexpr int64_t kDefaultKvBytes = int64_t{1} << 30;
constexpr int64_t kMaxBlocks = INT32_MAX;  // block ids are int32

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What ops may take for themselves, which grows to the largest batch seen; at least a twelfth of
// the device, for plans of batches and fragments too. Host memory needs none of it.
int64_t ScratchBytes(const ops::DeviceInfo& device) {
  if (device.kind != DeviceKind::kCuda) return 0;
  return std::max(device.total_bytes / 12, device.op_scratch_bytes);
}

struct FixedBytes {
  int64_t weights, workspace, scratch, gradients, optimizer, prompt_states;

  int64_t total() const {
    return weights + workspace + scratch + gradients + optimizer + prompt_states;
  }
};

FixedBytes FixedBytesOf(const Config& config, const ModelConfig& model,
                        const ops::DeviceInfo& device, int64_t workspace_bytes) {
  const int64_t elements = NumParameterElements(model);
  const int64_t masters = elements * SizeOf(DType::kF32);
  const bool has_remainder = device.compute_dtype != DType::kF32;
  return {.weights = elements * SizeOf(device.compute_dtype),
          .workspace = workspace_bytes,
          .scratch = ScratchBytes(device),
          .gradients = GradientArena::SizeBytes(model, config.GradientDType()),
          .optimizer = 2 * masters + (has_remainder ? masters / 2 : 0),
          .prompt_states = config.prompt_state_bytes};
}

int64_t NumBlocks(const Config& config, int64_t blocks_per_context, int64_t block_bytes,
                  int64_t spare_bytes) {
  if (config.kv_blocks > 0) return config.kv_blocks;
  if (config.kv_bytes > 0) return std::min(config.kv_bytes / block_bytes, kMaxBlocks);
  if (config.kv_fraction > 0) {
    const double bytes = config.kv_fraction * static_cast<double>(spare_bytes);
    return std::min(static_cast<int64_t>(bytes) / block_bytes, kMaxBlocks);
  }
  const int64_t affordable = std::max(kDefaultKvBytes / block_bytes, blocks_per_context);
  return std::min({kDefaultContexts * blocks_per_context, affordable, kMaxBlocks});
}

absl::Status CheckSpare(const Config& config, const ops::DeviceInfo& device,
                        const FixedBytes& fixed) {
  if (config.kv_fraction == 0 || device.free_bytes > fixed.total()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "no memory for --kv_fraction: want more free bytes than the ", fixed.total(),
      " of weights, workspace, scratch, gradients, optimizer and prompt states, got ",
      device.free_bytes,
      "; use --kv_bytes, which counts none of the training's memory, or a larger device"));
}

}  // namespace

int64_t MemoryPlan::total_bytes() const {
  int64_t total = 0;
  for (const auto& [name, size_bytes] : regions) total += size_bytes;
  return total;
}

std::string MemoryPlan::ToString() const {
  const auto mebibytes = [](std::string* out, const std::pair<std::string, int64_t>& region) {
    absl::StrAppend(out, region.first, "_mib=", CeilDiv(region.second, int64_t{1} << 20));
  };
  return absl::StrCat(absl::StrJoin(regions, " ", mebibytes),
                      " total_mib=", CeilDiv(total_bytes(), int64_t{1} << 20),
                      " num_blocks=", num_blocks, " block_bytes=", block_bytes,
                      " max_context=", max_context);
}

absl::StatusOr<MemoryPlan> PlanMemory(const Config& config, const ModelConfig& model,
                                      const ops::DeviceInfo& device, int64_t workspace_bytes) {
  if (config.max_context > model.max_positions) {
    return absl::InvalidArgumentError(
        absl::StrCat("context too long: want --max_context at most ", model.max_positions,
                     " (the model's limit), got ", config.max_context, "; lower --max_context"));
  }
  const FixedBytes fixed = FixedBytesOf(config, model, device, workspace_bytes);
  RETURN_IF_ERROR(CheckSpare(config, device, fixed));
  const int64_t spare = device.free_bytes - fixed.total();
  MemoryPlan plan;
  plan.max_context = config.max_context > 0 ? config.max_context : model.max_positions;
  plan.block_bytes = KvPool::BytesPerBlock(model, config.block_tokens, device.compute_dtype);
  const int64_t blocks_per_context = CeilDiv(plan.max_context, config.block_tokens);
  plan.num_blocks = NumBlocks(config, blocks_per_context, plan.block_bytes, spare);
  if (plan.num_blocks < blocks_per_context) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv pool too small: want ", blocks_per_context, " blocks of ",
                     config.block_tokens, " tokens for max_context=", plan.max_context, ", got ",
                     plan.num_blocks, "; raise --kv_bytes or --kv_blocks, or lower --max_context"));
  }
  const int64_t kv_bytes = plan.num_blocks * plan.block_bytes;
  plan.activation_bytes = config.activation_bytes;
  if (plan.activation_bytes == 0 && device.kind == DeviceKind::kCuda) {
    const int64_t left = device.free_bytes - fixed.weights - fixed.workspace - kv_bytes;
    plan.activation_bytes = std::max({spare - kv_bytes, left / 8, int64_t{0}});
  }
  plan.regions = {{"weights", fixed.weights},
                  {"kv_blocks", kv_bytes},
                  {"workspace", fixed.workspace},
                  {"scratch", fixed.scratch},
                  {"gradients", fixed.gradients},
                  {"optimizer", fixed.optimizer},
                  {"prompt_states", fixed.prompt_states},
                  {"activations", plan.activation_bytes}};
  return plan;
}

}  // namespace coppice
