// Launchers of tree attention (Vaswani et al. 2017 under the mask of kernels/ops/token_batch.h),
// forward and backward.
//
//   out[q] = sum_k softmax_k(scale q.k) v[k]          lse[q] = log sum_k exp(scale q.k)
//   dS[q,k] = P[q,k] (d_out[q].v[k] - delta[q])       delta[q] = out[q].d_out[q]
//   d_q[q] = scale sum_k dS[q,k] k[k]
//   d_k[k] = scale sum_{q, heads of the group} dS[q,k] q[q]        d_v[k] = sum P[q,k] d_out[q]
//
// Every result is the same bit for bit on every run: no atomics on data, sums in list order
// whichever multiprocessor runs them. Row strides are in elements and multiples of 8; pointers are
// 16-byte aligned; heads of a row are contiguous. Errors: cudaErrorNotSupported for a head_dim or
// device without kernels, cudaErrorInvalidValue for scratch too small. Thread: any; the launch is
// queued on `stream` and borrows everything until it ran.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/cuda/attention/attention_schedule.h"

namespace coppice::cuda {

struct AttentionShape {
  int64_t rows = 0;
  int32_t q_heads = 0, kv_heads = 0;
  int32_t head_dim = 0;
  float scale = 0;
  DType dtype = DType::kBF16;  // or kF16: of queries, keys, values, outputs and their gradients
};

struct RowMatrix {
  void* data = nullptr;    // [rows, heads, head_dim] of the shape's dtype
  int64_t row_stride = 0;  // elements
};

// One layer's pages, contiguous.
struct ContextPages {
  const void* k = nullptr;  // [blocks, block_tokens, kv_heads, head_dim] of the shape's dtype
  const void* v = nullptr;  // same
  int64_t num_blocks = 0;
  int32_t block_tokens = 0;
};

// Gradients of one layer's pages, +=; null: not wanted.
struct ContextGradients {
  float* k = nullptr;  // [blocks, block_tokens, kv_heads, head_dim] f32
  float* v = nullptr;  // same
};

struct TreeAttentionArgs {
  AttentionShape shape;
  AttentionSchedule schedule;
  RowMatrix q, k, v;
  ContextPages context;  // where the schedule has context
  RowMatrix out;
  float* lse = nullptr;     // optional [rows, q_heads] f32
  void* scratch = nullptr;  // TreeAttentionScratchBytes, 256-byte aligned
};

struct TreeAttentionBackwardArgs {
  AttentionShape shape;
  AttentionSchedule schedule;  // planned with `backward`
  RowMatrix q, k, v;
  ContextPages context;  // where the schedule has context
  ContextGradients d_context;
  RowMatrix out;
  const float* lse = nullptr;  // [rows, q_heads] f32, of forward
  RowMatrix d_out;
  RowMatrix d_q, d_k, d_v;
  const BackwardRound* rounds = nullptr;  // [schedule.num_rounds] of the plan, host memory
  void* scratch = nullptr;                // TreeAttentionBackwardScratchBytes, 256-byte aligned
  int64_t scratch_bytes = 0;
  // On mma.sync, where there are no tile kernels: wants one round and no scratch for dS. On a
  // device with tile kernels the same to rounding.
  bool portable = false;
};

// True if the tile kernels run this head_dim on this device (compute capability major * 10 +
// minor): AttentionPlanOptions::tiles.
bool HasTileKernels(int32_t head_dim, int compute_capability);
// The same for AttentionPlanOptions::stacked.
bool HasStackedKernels(int32_t head_dim, int compute_capability);
// Shared memory of a block of the kernels for every device: as much they want where there are no
// tile kernels. 0: none for this head_dim.
int32_t PortableSharedBytes(int32_t head_dim);
// Blocks of a KV head that the current device runs at once, perhaps none:
// AttentionPlanOptions::decode_slots.
int32_t DecodeSlots(int32_t kv_heads);

int64_t TreeAttentionScratchBytes(const AttentionSchedule& schedule, const AttentionShape& shape);
cudaError_t LaunchTreeAttention(const TreeAttentionArgs& args, cudaStream_t stream);

// dS of shorter heads is not stored: to recompute it costs less.
inline constexpr int32_t kStoredScoresHeadDim = 128;
// Images of backward's plan whose dS fits in so many bytes, of all heads; 0 where dS is not kept
// because it costs more than it saves: short heads.
int32_t ImagesOfBytes(const AttentionShape& shape, int64_t bytes);
// Items of work of dQ from stored dS, of all heads: of a query tile; that the current device runs
// at once.
int32_t QueryTileItems(const AttentionShape& shape);
int32_t WaveItems();
// With dS of `kv_heads` KV heads at a time between the passes of dK/dV and dQ, in each of the
// plan's rounds (32 KiB per 128 x 128 tile pair and query head). With less memory fewer heads go
// together, to the same bits; where not even one fits, dQ recomputes S and dP, the same to
// rounding.
int64_t TreeAttentionBackwardScratchBytes(const AttentionSchedule& schedule,
                                          const AttentionShape& shape, int32_t kv_heads);
cudaError_t LaunchTreeAttentionBackward(const TreeAttentionBackwardArgs& args, cudaStream_t stream);

}  // namespace coppice::cuda
