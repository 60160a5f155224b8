// How the blocks of layer_chain.cu add up a tile's sums.
//
// Sums travel through memory that holds kNothing before they come and after they were taken: a word
// that is something else has come, so no flag and no fence is needed.
#pragma once

#include "kernels/cuda/layer_chain_steps.cuh"

namespace coppice::cuda {

constexpr uint32_t kNothing = 0xffffffffu;  // a NaN that no sum is

__device__ __forceinline__ float4 LoadSums(const float4* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ void StoreWords(float4* to, uint32_t x, uint32_t y, uint32_t z,
                                           uint32_t w) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x), "r"(y),
               "r"(z), "r"(w)
               : "memory");
}
__device__ __forceinline__ uint32_t Something(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits < kNothing ? bits : kNothing - 1;
}
__device__ __forceinline__ bool IsMissing(float4 x) {
  return max(max(__float_as_uint(x.x), __float_as_uint(x.y)),
             max(__float_as_uint(x.z), __float_as_uint(x.w))) == kNothing;
}

// A tile's sums from its pieces. They are added up in groups of 8 tokens, of which a lane holds 16
// bytes: group j by adder j * adders / kGroups.
template <typename Shape>
struct Adder {
  static constexpr int kTokens = Shape::kTokens, kGroups = kTokens / 8;
  const ChainParameters& p;
  const Piece& piece;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  __device__ __forceinline__ float4* At(int i, int j) const {
    return p.pieces + (piece.Place(i) * kTokens + 8 * j + warp) * 32 + lane;
  }
  // Groups that this piece's block adds up.
  __device__ __forceinline__ Groups Own() const {
    if (piece.index >= piece.adders) return {0, 0};
    return {(piece.index * kGroups + piece.adders - 1) / piece.adders,
            ((piece.index + 1) * kGroups + piece.adders - 1) / piece.adders};
  }
  // The others, to those that add them.
  __device__ __forceinline__ void Send(const float (&sum)[kTokens / 2], const Groups& own) const {
    float4* to = At(piece.index, 0);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (!own.Has(j))
        StoreWords(to + j * 256, Something(sum[4 * j]), Something(sum[4 * j + 1]),
                   Something(sum[4 * j + 2]), Something(sum[4 * j + 3]));
    }
  }
  // Adds what two pieces' other one sent, of all groups together.
  __device__ __forceinline__ void AddOther(float (&sum)[kTokens / 2], const Groups& own) const {
    float4* at = At(1 - piece.index, 0);
    float4 x[kGroups];
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      x[j] = {0.f, 0.f, 0.f, 0.f};
      if (own.Has(j)) x[j] = LoadSums(at + j * 256);
    }
    for (bool all = false; !all;) {
      all = true;
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        if (!IsMissing(x[j])) continue;
        all = false;
        x[j] = LoadSums(at + j * 256);
      }
    }
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (!own.Has(j)) continue;
      Empty(at + j * 256);
      AddTo(sum, j, x[j]);
    }
  }
  // Adds what the others sent, in the order of columns: of several groups together where that
  // is no more than kTogether places, of one in several turns where it is more.
  __device__ __forceinline__ void AddOthers(float (&sum)[kTokens / 2], const Groups& own) const {
    constexpr int kTogether = 8;
    const int others = piece.count - 1;
    int first = 0, group = own.begin;
#pragma unroll 1
    while (group < own.end) {
      const int width = min(others - first, kTogether);
      const int groups = max(min(kTogether / others, own.end - group), 1);
      float4* at[kTogether];
      float4 x[kTogether];
      int other = first, j = group;
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        at[k] = At(other + (other >= piece.index), j);
        x[k] = {0.f, 0.f, 0.f, 0.f};
        if (k < groups * width) x[k] = LoadSums(at[k]);
        if (++other == first + width) other = first, ++j;
      }
      for (bool all = false; !all;) {
        all = true;
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          if (!IsMissing(x[k])) continue;
          all = false;
          x[k] = LoadSums(at[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (k < groups * width) Empty(at[k]);
#pragma unroll 1
      for (int i = 0; i < groups; ++i) {
        float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int k = 0; k < kTogether; ++k)
          if (i * width <= k && k < (i + 1) * width) Add(total, x[k]);
        AddTo(sum, group + i, total);
      }
      first += width;
      if (first == others) first = 0, group += groups;
    }
  }

 private:
  static __device__ __forceinline__ void Empty(float4* place) {
    StoreWords(place, kNothing, kNothing, kNothing, kNothing);
  }
  static __device__ __forceinline__ void Add(float4& to, const float4& x) {
    to.x += x.x, to.y += x.y, to.z += x.z, to.w += x.w;
  }
  static __device__ __forceinline__ void AddTo(float (&sum)[kTokens / 2], int j, const float4& x) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
      if (i == j)
        sum[4 * i] += x.x, sum[4 * i + 1] += x.y, sum[4 * i + 2] += x.z, sum[4 * i + 3] += x.w;
  }
};

template <typename Shape>
__device__ __forceinline__ void FinishPiece(const ChainParameters& p, const ChainPhase& phase,
                                            ChainShared<Shape>& s, const Piece& piece,
                                            float (&sum)[Shape::kTokens / 2]) {
  const Adder<Shape> adder = {p, piece};
  const Groups own = adder.Own();
  if (piece.count > 1) adder.Send(sum, own);
  if (own.begin == own.end) return;
  const Finisher<Shape> finisher(p, phase, s, piece.tile);
  typename Finisher<Shape>::Addends addends;
  finisher.ReadAddends(own, addends);
  if (piece.count == 2) adder.AddOther(sum, own);
  if (piece.count > 2) adder.AddOthers(sum, own);
  finisher.Finish(own, sum, addends);
}

}  // namespace coppice::cuda
