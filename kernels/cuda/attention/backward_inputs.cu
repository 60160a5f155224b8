// What backward prepares: row sums, and cached context gathered from its pages.
#include "kernels/cuda/attention/backward_units.cuh"
#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/log2_units.cuh"

namespace coppice::cuda {
namespace {

constexpr int kRowsPerBlock = 16;

// delta = rowsum(out * d_out) and lse in log2 units, both head-major so that a tile's rows lie
// together. D / 8 threads a row, 16 bytes each; a block takes 16 rows of one head. Reads 4 D bytes,
// writes 8 per row and head; bound by that.
struct RowsParameters {
  const uint16_t *out, *d_out;  // of E
  const float* lse;
  float *row_lse, *row_delta;
  int64_t out_stride, d_out_stride;
  int rows, padded;
};

template <typename E, int D>
__global__ void AttentionRowSumsKernel(const RowsParameters p) {
  constexpr int kLanes = D / 8;
  const int row = blockIdx.x * kRowsPerBlock + threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int head = blockIdx.y, heads = gridDim.y;
  float sum = 0.f;
  if (row < p.rows) {
    const int column = head * D + lane * 8;
    const uint4 a = *reinterpret_cast<const uint4*>(p.out + row * p.out_stride + column);
    const uint4 b = *reinterpret_cast<const uint4*>(p.d_out + row * p.d_out_stride + column);
    const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 u = Pair<E>(x[i]);
      const float2 v = Pair<E>(y[i]);
      sum += u.x * v.x + u.y * v.y;
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (lane == 0) {
    const int64_t at = int64_t{head} * p.padded + row;
    p.row_lse[at] =
        row < p.rows ? p.lse[int64_t{row} * heads + head] * kLog2e - kBackwardShift<E> : INFINITY;
    p.row_delta[at] = sum;
  }
}

// A block copies one context tile of one tensor, 16 bytes a thread and step; keys behind the last
// token become zeros. Reads and writes every context key once; bound by that.
struct GatherParameters {
  const uint4 *k, *v;        // [slots, width] 16-byte words
  uint4 *dense_k, *dense_v;  // [context tiles, kKeyTile, width]
  const ContextTile* tiles;
  const int32_t *slots, *ends;
  int width, run_slots;
};

__global__ void GatherContextKernel(const GatherParameters p) {
  const ContextTile tile = p.tiles[blockIdx.x];
  const uint4* pages = blockIdx.y == 0 ? p.k : p.v;
  uint4* dense =
      (blockIdx.y == 0 ? p.dense_k : p.dense_v) + int64_t{blockIdx.x} * kKeyTile * p.width;
  for (int i = threadIdx.x; i < kKeyTile * p.width; i += blockDim.x) {
    const int row = i / p.width;
    uint4 word = {0, 0, 0, 0};
    if (p.ends[tile.first_end + row] > 0) {
      const int64_t slot = p.slots[tile.first_piece + row / p.run_slots] + row % p.run_slots;
      word = pages[slot * p.width + i % p.width];
    }
    dense[i] = word;
  }
}

template <typename E, int D>
cudaError_t LaunchRowSums(const BackwardPass& b, cudaStream_t stream) {
  const TreeAttentionBackwardArgs& a = *b.args;
  const int padded = static_cast<int>(PaddedRows(a.shape.rows));
  const RowsParameters p = {static_cast<const uint16_t*>(a.out.data),
                            static_cast<const uint16_t*>(a.d_out.data),
                            a.lse,
                            b.row_lse,
                            b.row_delta,
                            a.out.row_stride,
                            a.d_out.row_stride,
                            static_cast<int>(a.shape.rows),
                            padded};
  const dim3 grid(padded / kRowsPerBlock, a.shape.q_heads);
  AttentionRowSumsKernel<E, D><<<grid, kRowsPerBlock * D / 8, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchBackwardRowSums(const BackwardPass& pass, cudaStream_t stream) {
  const AttentionShape& shape = pass.args->shape;
  return ForElement(shape.dtype, [&](auto element) {
    using E = decltype(element);
    if (shape.head_dim == 64) return LaunchRowSums<E, 64>(pass, stream);
    if (shape.head_dim == 128) return LaunchRowSums<E, 128>(pass, stream);
    if (shape.head_dim == 256) return LaunchRowSums<E, 256>(pass, stream);
    return cudaErrorNotSupported;
  });
}

cudaError_t LaunchGatherContext(const BackwardPass& pass, cudaStream_t stream) {
  const TreeAttentionBackwardArgs& a = *pass.args;
  const GatherParameters p = {static_cast<const uint4*>(a.context.k),
                              static_cast<const uint4*>(a.context.v),
                              static_cast<uint4*>(pass.context_k),
                              static_cast<uint4*>(pass.context_v),
                              a.schedule.context_tiles,
                              a.schedule.context_slots,
                              a.schedule.context_ends,
                              a.shape.kv_heads * a.shape.head_dim / 8,
                              RunSlots(a.context)};
  const dim3 grid(a.schedule.num_context_tiles, 2);
  GatherContextKernel<<<grid, 512, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace coppice::cuda
