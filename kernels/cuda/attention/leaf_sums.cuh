// Leaves of the decode kernel: softmax sums of stacked rows, eight at a time, over a short run of
// keys, by one warp on mma.sync. Its instructions wait behind the wgmma of the warps beside it, 200
// cycles each, so that their number counts: keys are the 16-row operand, rows the eight columns,
// half as many as the other way round.
//
//   S^T = K Q^T          O^T = V^T P^T
#pragma once

#include "kernels/cuda/attention/packed_parts.cuh"

namespace coppice::cuda {

constexpr int kLeafKeys = 16;  // of a tile

template <typename E, int D>
using LeafShared = ChunkShared<E, D, kLeafKeys, 2>;

// An 8 x 8 matrix whose row lane / 4 the lane has two neighbours of, transposed.
__device__ __forceinline__ uint32_t Transposed(uint32_t pair) {
  uint32_t other;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(other) : "r"(pair));
  return other;
}

// Of columns lane / 4 (+ 8) of 16 each and rows 2 (lane % 4) + e: out[i][2 h + e]. The sum is the
// lane's share: of keys lane / 4 (+ 8) of each tile.
template <int D>
struct LeafSums {
  float out[D / 16][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
};

// One warp; kPacked: partial results as in packed_parts.cuh.
template <typename E, int D, bool kPacked>
struct LeafWork {
  using Keys = WarpWork<D, 1, LeafShared<E, D>>;
  static constexpr int kRows = 8, kStages = LeafShared<E, D>::kStages;
  const ChunkParameters<E>& p;
  const Keys& keys;
  const int lane = threadIdx.x % 32;

  __device__ __forceinline__ void Run() const {
    for (int first = 0; first < NumStacked(); first += kRows) {
      LeafSums<D> sums;
      Sum(sums, first);
      Store(sums, first);
    }
  }

 private:
  __device__ __forceinline__ int NumStacked() const { return keys.item.num_rows * p.group_size; }

  // As B operands, zeros behind the last row.
  __device__ __forceinline__ void LoadQueries(uint32_t (&q)[D / 16][2], int stacked) const {
    const int2 at = keys.RowAndHead(stacked);
    const E* from = p.q + at.x * p.q_stride + at.y * D + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      q[i][0] = at.x < 0 ? 0 : *reinterpret_cast<const uint32_t*>(from + i * 16);
      q[i][1] = at.x < 0 ? 0 : *reinterpret_cast<const uint32_t*>(from + i * 16 + 8);
    }
  }

  // Of keys lane / 4 + 8 h and rows 2 (lane % 4) + e: scores[2 h + e].
  __device__ __forceinline__ void Score(float (&scores)[4], const uint32_t (&q)[D / 16][2],
                                        uint32_t tile) const {
    float odd[4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t a[4];
      const int row = lane % 16, piece = 2 * i + lane / 16;
      LoadMatrices(a, tile + (row * (D / 8) + (piece ^ (row & 7))) * 16);
      Multiply<E>(i % 2 ? odd : scores, a, q[i][0], q[i][1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = (scores[i] + odd[i]) * (p.scale * kLog2e);
  }

  // Scores to exponentials.
  __device__ __forceinline__ void Exponentials(LeafSums<D>& s, float (&x)[4]) const {
    float top[2], shrink[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      top[e] = fmaxf(x[e], x[2 + e]);
#pragma unroll
      for (int i = 4; i < 32; i *= 2) top[e] = fmaxf(top[e], __shfl_xor_sync(~0u, top[e], i));
    }
    if (__any_sync(~0u, top[0] > s.max[0] || top[1] > s.max[1])) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        top[e] = fmaxf(top[e], s.max[e]);
        shrink[e] = top[e] == -INFINITY ? 1.f : Exp2(s.max[e] - top[e]);
        s.max[e] = top[e], s.sum[e] *= shrink[e];
      }
#pragma unroll
      for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) s.out[i][k] *= shrink[k % 2];
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[k] = x[k] == -INFINITY ? 0.f : Exp2(x[k] - s.max[k % 2]);
      s.sum[k % 2] += x[k];
    }
  }

  __device__ __forceinline__ void AddValues(LeafSums<D>& s, const float (&x)[4],
                                            uint32_t tile) const {
    const uint32_t low = Transposed(PackPair<E>(x[0], x[1]));
    const uint32_t high = Transposed(PackPair<E>(x[2], x[3]));
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
      uint32_t a[4];
      const int row = lane / 16 * 8 + lane % 8, piece = 2 * i + lane / 8 % 2;
      LoadMatricesTransposed(a, tile + (row * (D / 8) + (piece ^ (row & 7))) * 16);
      Multiply<E>(s.out[i], a, low, high);
    }
  }

  // Rows [first, first + kRows).
  __device__ __forceinline__ void Sum(LeafSums<D>& s, int first) const {
    const int begin = keys.item.key_begin, end = keys.item.key_end;
    keys.StartSplit(begin, end);
    uint32_t q[D / 16][2];
    LoadQueries(q, first + lane / 4);
    const int rows[2] = {keys.RowAndHead(first + lane % 4 * 2).x,
                         keys.RowAndHead(first + lane % 4 * 2 + 1).x};
    for (int key = begin, i = 0; key < end; key += kLeafKeys, ++i) {
      WaitCopies<kStages - 2>();
      __syncwarp();
      const int ahead = key + (kStages - 1) * kLeafKeys;
      if (ahead < end) keys.LoadTile(ahead, end, (i + kStages - 1) % kStages);
      CommitCopies();
      const auto& tile = keys.shared.keys[i % kStages];
      float x[4] = {};
      Score(x, q, SharedAddress(tile[0]));
      if (key + kLeafKeys > min(keys.item.context_tokens, end)) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (!keys.Sees(rows[k % 2], key + lane / 4 + k / 2 * 8, end)) x[k] = -INFINITY;
      }
      Exponentials(s, x);
      AddValues(s, x, SharedAddress(tile[1]));
    }
    WaitCopies<0>();
    __syncwarp();
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int i = 4; i < 32; i *= 2) s.sum[e] += __shfl_xor_sync(~0u, s.sum[e], i);
  }

  // Neighbouring columns are a lane's and the one's four further on: one takes the pairs of row e =
  // 0, the other those of e = 1.
  __device__ __forceinline__ void Store(const LeafSums<D>& s, int first) const {
    const int e = lane / 4 % 2, stacked = first + lane % 4 * 2 + e;
    float pairs[D / 8][2];
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const float low = s.out[j / 2][j % 2 * 2], high = s.out[j / 2][j % 2 * 2 + 1];
      const float other = __shfl_xor_sync(~0u, e ? low : high, 4);
      pairs[j][0] = e ? other : low, pairs[j][1] = e ? high : other;
    }
    const int2 at = keys.RowAndHead(stacked);
    const int64_t part = (int64_t{keys.item.partial} + stacked / p.group_size) * p.q_heads + at.y;
    const float max = e ? s.max[1] : s.max[0], sum = e ? s.sum[1] : s.sum[0];
    const PartialRow<D> row{at.x < 0 ? -1 : part, lane / 8, /*quad_bit=*/8};
    row.template Store<kPacked>(p, max, sum, [&](int j, int k) { return pairs[j][k]; });
  }
};

}  // namespace coppice::cuda
