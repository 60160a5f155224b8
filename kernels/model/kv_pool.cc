#include "kernels/model/kv_pool.h"

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace coppice {

int64_t KvPool::BytesPerBlock(const ModelConfig& config, int64_t block_tokens, DType dtype) {
  return config.num_layers * 2 * block_tokens * config.kv_dim() * SizeOf(dtype);
}

absl::StatusOr<KvPool> KvPool::Create(const ModelConfig& config, int64_t num_blocks,
                                      int64_t block_tokens, ops::Ops& ops) {
  CHECK_GT(num_blocks, 0);
  CHECK_GT(block_tokens, 0);
  const DType dtype = ops.Info().compute_dtype;
  KvPool pool;
  pool.num_blocks_ = num_blocks;
  pool.block_tokens_ = block_tokens;
  ASSIGN_OR_RETURN(
      pool.buffer_,
      ops.Allocate(num_blocks * BytesPerBlock(config, block_tokens, dtype), "kv pool"));
  pool.all_ = View4D(pool.buffer_.data(), dtype, config.num_layers * 2, num_blocks, block_tokens,
                     config.kv_dim());
  const int64_t plane_bytes = num_blocks * block_tokens * config.kv_dim() * SizeOf(dtype);
  auto plane = [&](int64_t i) {
    return View4D(static_cast<char*>(pool.buffer_.data()) + i * plane_bytes, dtype, num_blocks,
                  block_tokens, config.kv_heads, config.head_dim);
  };
  for (int64_t l = 0; l < config.num_layers; ++l) {
    pool.layers_.push_back({.k = plane(2 * l), .v = plane(2 * l + 1)});
  }
  return pool;
}

}  // namespace coppice
