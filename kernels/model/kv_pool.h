// KvPool: the one buffer of all KV blocks, all layers. Which block holds what is cache/'s business.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "kernels/base/device.h"
#include "kernels/model/model_config.h"
#include "kernels/ops/ops.h"

namespace coppice {

class KvPool {
 public:
  static absl::StatusOr<KvPool> Create(const ModelConfig& config, int64_t num_blocks,
                                       int64_t block_tokens, ops::Ops& ops);
  static int64_t BytesPerBlock(const ModelConfig& config, int64_t block_tokens, DType dtype);

  int64_t num_blocks() const { return num_blocks_; }
  int64_t block_tokens() const { return block_tokens_; }
  // Pages of one layer: k and v [blocks, block_tokens, kv_heads, head_dim].
  const ops::PagedKv& layer(int64_t l) const { return layers_[l]; }
  // [layers * 2, blocks, block_tokens, kv_dim], for Ops::CopyBlocks.
  TensorView all() const { return all_; }

 private:
  DeviceBuffer buffer_;
  TensorView all_;
  std::vector<ops::PagedKv> layers_;
  int64_t num_blocks_ = 0;
  int64_t block_tokens_ = 0;
};

}  // namespace coppice
