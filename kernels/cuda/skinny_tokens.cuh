// How rows of x come into a block of skinny_matmul.cu: by bulk copies of 64 columns a step where
// they are an operand as they stand; through registers where a norm's weight multiplies them.
#pragma once

#include "kernels/cuda/skinny_tile.cuh"

namespace coppice::cuda {

// By one thread: boxes of x.
template <typename Shape>
__device__ void LoadTokenBoxes(const SkinnyParameters& p, SkinnyShared<Shape>& s) {
  Ring<Shape::kXStages> ring;
  const ColumnBlocks blocks(p);
  for (int b = blocks.begin; b < blocks.end; ++b, ring.Advance()) {
    s.x_empty[ring.stage].Wait(ring.phase ^ 1);
    s.x_full[ring.stage].ArriveExpecting(Shape::kXStageBytes);
    LoadBox(s.x[ring.stage], p.x, b * kColumns, 0, 0, s.x_full[ring.stage]);
  }
}

// 8 columns of a token, and of the norm's weight.
template <typename E>
struct Piece {
  float4 x[2];
  uint4 norm;

  __device__ __forceinline__ void Read(const SkinnyArgs& a, int token, int column) {
    const bool inside = column < a.k && token < a.rows;
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(a.x) +
                                                       token * a.x_stride + column);
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = inside ? __ldcg(from + i) : float4{};
    const auto* weight = static_cast<const E*>(a.norm) + column;
    norm = inside ? *reinterpret_cast<const uint4*>(weight) : uint4{};
  }
  // x * norm * kNormedUnit; adds the squares of x.
  __device__ __forceinline__ uint4 Scale(float& squares) const {
    uint4 y;
    const auto* by = reinterpret_cast<const uint32_t*>(&norm);
    auto* to = reinterpret_cast<uint32_t*>(&y);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 v = reinterpret_cast<const float2*>(x)[i], w = Pair<E>(by[i]);
      squares += v.x * v.x + v.y * v.y;
      to[i] = PackPair<E>(v.x * w.x * kNormedUnit<E>, v.y * w.y * kNormedUnit<E>);
    }
    return y;
  }
};

// By the multipliers: x * norm of column blocks [begin, end), at most kXStages, into the stages.
// Thread t has pieces t % 8 of lane t / 8 of kSquareLanes, which is a token.
template <typename Shape>
__device__ __forceinline__ void BringNormedTokens(const SkinnyArgs& a, SkinnyShared<Shape>& s,
                                                  int begin, int end, float& squares) {
  constexpr int kTogether = kSquareLanes / Shape::kTokens;  // column blocks
  constexpr int kPieces = Shape::kXStages / kTogether, kAhead = kPieces / 2;
  const int token = threadIdx.x / 8 % Shape::kTokens, piece = threadIdx.x % 8;
  const int first = threadIdx.x / 8 / Shape::kTokens;
  const int place = token * 128 + ((piece ^ (token & 7)) << 4);
#pragma unroll
  for (int round = 0; round < kPieces; round += kAhead) {
    Piece<typename Shape::Element> pieces[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int b = begin + (round + i) * kTogether + first;
      pieces[i].Read(a, b < end ? token : kSquareLanes, b * kColumns + piece * 8);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const uint4 y = pieces[i].Scale(squares);
      *reinterpret_cast<uint4*>(s.x[(round + i) * kTogether + first] + place) = y;
    }
  }
  FenceAsyncShared();
}

// Sums of squares of this block's columns to every rank.
template <typename Shape>
__device__ __forceinline__ void SendSquares(SkinnyShared<Shape>& s, float squares) {
  for (int d = 1; d < 8; d *= 2) squares += __shfl_xor_sync(~0u, squares, d);
  const int to = threadIdx.x % 8;
  if (to < ClusterSize())
    Send(to, &s.squares[ClusterRank()][threadIdx.x / 8], squares, s.sums_full);
}

}  // namespace coppice::cuda
