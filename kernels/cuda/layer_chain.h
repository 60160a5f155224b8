// The products of a decoding step from one layer's attention to the next layer's, as one kernel:
//
//   mid = input + attn_out o^T              output = mid + act down^T
//   act = silu(gate) up,  [gate | up] = norm(mid) gate_up^T
//   qkv = norm(output) qkv^T + bias         (optional: the next layer's, and its rotation)
//
// for few rows: bound by reading the weights once, which never stops between the products.
// Deterministic: the order of sums follows from the shapes and the number of multiprocessors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/base/dtype.h"

namespace coppice::cuda {

constexpr int64_t kMaxChainRows = 64;
constexpr int64_t kMaxChainHidden = 16384;

struct ChainMatrix {
  const void* data = nullptr;  // [n, k] E
  int64_t stride = 0;
};

// Norm of q's and k's heads, RoPE, keys and values into their pages, all behind the projections:
// ops::QkNormRope in place.
struct ChainRotation {
  const int32_t *positions = nullptr, *kv_slots = nullptr;  // [rows]; no slots: nothing is stored
  const float* rope = nullptr;                              // [max_positions, head_dim]
  const void *q_norm = nullptr, *k_norm = nullptr;          // optional [head_dim] E
  void *page_k = nullptr, *page_v = nullptr;                // [slots, kv_heads, head_dim] E
  int q_heads = 0, kv_heads = 0, head_dim = 0;              // 64 or 128
};

// E is what `dtype` says.
struct LayerChainArgs {
  DType dtype = DType::kBF16;      // or kF16
  const void* attn_out = nullptr;  // [rows, attn_columns] E
  int64_t attn_out_stride = 0;
  ChainMatrix o, gate_up, down;            // [hidden, attn_columns], [2 ffn, hidden], [hidden, ffn]
  ChainMatrix qkv;                         // optional [qkv_columns, hidden]
  const void* input = nullptr;             // [rows, hidden] f32
  void *mid = nullptr, *output = nullptr;  // [rows, hidden] f32; all three may be one
  int64_t input_stride = 0, mid_stride = 0, output_stride = 0;
  // Memory for the products' operands: [rows, hidden], [rows, ffn], with qkv [rows, hidden] E.
  // The first may be the last.
  void *mlp_in = nullptr, *act = nullptr, *attn_in = nullptr;
  int64_t mlp_in_stride = 0, act_stride = 0, attn_in_stride = 0;
  const void* mlp_norm = nullptr;   // [hidden] E
  const void* next_norm = nullptr;  // [hidden] E, with qkv
  const void* qkv_bias = nullptr;   // optional [qkv_columns] E
  void* qkv_out = nullptr;          // [rows, qkv_columns] E, with qkv
  int64_t qkv_out_stride = 0;
  ChainRotation rotation;  // optional (no positions)
  float eps = 0;
  int64_t rows = 0, hidden = 0, attn_columns = 0, ffn = 0, qkv_columns = 0;
};

// Memory that the launches of one stream share: sums on their way, counters.
struct LayerChainMemory {
  void* data = nullptr;
  int blocks = 0;
};
// Blocks of the grid: the multiprocessors of the device, or 0 where they do not all hold one.
cudaError_t CountChainBlocks(int& blocks);
int64_t LayerChainMemoryBytes(int blocks);
// Once, before the first launch.
cudaError_t InitLayerChainMemory(const LayerChainMemory& memory, cudaStream_t stream);

// REQUIRES: 1 <= rows <= kMaxChainRows; hidden <= kMaxChainHidden; k of every product, ffn and the
// strides multiples of 8; what is read by 16-byte copies (attn_out, weights) on such boundaries,
// the rest on those of two elements; memory.blocks > 0; no launch of another stream at the same
// time.
cudaError_t LaunchLayerChain(const LayerChainArgs& args, const LayerChainMemory& memory,
                             cudaStream_t stream);

}  // namespace coppice::cuda
