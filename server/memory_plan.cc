#include "server/memory_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/model/kv_pool.h"
#include "kernels/model/parameters.h"

namespace coppice {
namespace {

constexpr int64_t kDefaultContexts = 16;
constexpr int64_t kDefaultKvBytes = int64_t{1} << 30;
constexpr int64_t kMaxBlocks = INT32_MAX;  // block ids are int32

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t NumBlocks(const Config& config, int64_t blocks_per_context, int64_t block_bytes) {
  if (config.kv_blocks > 0) return config.kv_blocks;
  if (config.kv_bytes > 0) return std::min(config.kv_bytes / block_bytes, kMaxBlocks);
  const int64_t affordable = std::max(kDefaultKvBytes / block_bytes, blocks_per_context);
  return std::min({kDefaultContexts * blocks_per_context, affordable, kMaxBlocks});
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

absl::StatusOr<MemoryPlan> PlanMemory(const Config& config, const ModelConfig& model, DType dtype,
                                      int64_t workspace_bytes) {
  if (config.max_context > model.max_positions) {
    return absl::InvalidArgumentError(
        absl::StrCat("context too long: want --max_context at most ", model.max_positions,
                     " (the model's limit), got ", config.max_context, "; lower --max_context"));
  }
  MemoryPlan plan;
  plan.max_context = config.max_context > 0 ? config.max_context : model.max_positions;
  plan.block_bytes = KvPool::BytesPerBlock(model, config.block_tokens, dtype);
  const int64_t blocks_per_context = CeilDiv(plan.max_context, config.block_tokens);
  plan.num_blocks = NumBlocks(config, blocks_per_context, plan.block_bytes);
  if (plan.num_blocks < blocks_per_context) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv pool too small: want ", blocks_per_context, " blocks of ",
                     config.block_tokens, " tokens for max_context=", plan.max_context, ", got ",
                     plan.num_blocks, "; raise --kv_bytes or --kv_blocks, or lower --max_context"));
  }
  const int64_t weights = NumParameterElements(model) * SizeOf(dtype);
  const int64_t masters = NumParameterElements(model) * SizeOf(DType::kF32);
  plan.regions = {{"weights", weights},
                  {"kv_blocks", plan.num_blocks * plan.block_bytes},
                  {"workspace", workspace_bytes},
                  {"gradients", masters},
                  {"optimizer", 2 * masters + (dtype == DType::kF32 ? 0 : masters)}};
  return plan;
}

}  // namespace coppice
