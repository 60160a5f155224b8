// The steps that tree_attention.cc puts together. Internal to kernels/cuda/attention.
#pragma once

#include "kernels/cuda/attention/tree_attention.h"

namespace coppice::cuda {

// Of the current device.
inline int Multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Tile kernels. `counter`: one int of scratch.
cudaError_t LaunchTileForward(const TreeAttentionArgs& args, int* counter, cudaStream_t stream);

// Partial results of the chunk kernels, or, where the stacked kernel folds them itself, its packed
// parts in the same memory (packed_parts.cuh).
struct ChunkScratch {
  float* out = nullptr;    // [partials, q_heads, head_dim] not normalised
  float2* sums = nullptr;  // [partials, q_heads] maximum in log2 units, sum of exponentials
};
// Stacked chunks and leaves; then folds all partial results, those of LaunchChunks before it, too.
// Needs as many counters of arrivals as KV heads, and DecodeSlots blocks of each on the device.
cudaError_t LaunchStackedChunks(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                                cudaStream_t stream);
// The other chunks.
cudaError_t LaunchChunks(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                         cudaStream_t stream);
// Of its largest block; 0: there is none for this head_dim.
int32_t ChunkSharedBytes(int32_t head_dim);
// Folds partial results where nothing is stacked, rows are many, or other chunks have some, too.
cudaError_t LaunchMerges(const TreeAttentionArgs& args, const ChunkScratch& scratch,
                         cudaStream_t stream);

// Backward of KV heads [first_kv_head, + num_kv_heads) in one round, whose lists the schedule has.
struct BackwardPass {
  const TreeAttentionBackwardArgs* args = nullptr;
  float* row_lse = nullptr;    // [q_heads, padded rows] lse in log2 units, +inf past the last row
  float* row_delta = nullptr;  // [q_heads, padded rows]
  void* context_k = nullptr;   // [context tiles, kKeyTile, kv_heads, head_dim], if any
  void* context_v = nullptr;   // same
  void* ds = nullptr;          // dS of these heads, or null: dQ recomputes S and dP
  float* sums = nullptr;       // [packed key tiles, kv_heads, 2, kKeyTile, head_dim] dK and dV
  int* counters = nullptr;     // two ints of scratch
  int32_t first_kv_head = 0, num_kv_heads = 0;
};
cudaError_t LaunchBackwardRowSums(const BackwardPass& pass, cudaStream_t stream);   // of all heads
cudaError_t LaunchGatherContext(const BackwardPass& pass, cudaStream_t stream);     // of all heads
cudaError_t LaunchBackwardKeys(const BackwardPass& pass, cudaStream_t stream);      // d_k, d_v, dS
cudaError_t LaunchWideBackwardKeys(const BackwardPass& pass, cudaStream_t stream);  // head_dim 256
cudaError_t LaunchBackwardQueries(const BackwardPass& pass, cudaStream_t stream);   // d_q
cudaError_t LaunchStoredQueries(const BackwardPass& pass, cudaStream_t stream);     // from dS
// All of it on mma.sync, d_q, d_k and d_v: of one round and all heads.
cudaError_t LaunchPortableBackward(const BackwardPass& pass, cudaStream_t stream);
int32_t PortableBackwardSharedBytes(int32_t head_dim);  // of a block; 0: as above

}  // namespace coppice::cuda
