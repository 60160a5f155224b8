// What becomes of a tile's sums in layer_chain.cu: the residual stream, SwiGLU, projections, heads.
//
// Two warps a scheduler hide little: every phase ends with the latency of these instructions, so
// each step has its own loop, unrolled, with next to no arithmetic of addresses.
#pragma once

#include "kernels/cuda/layer_chain.cuh"

namespace coppice::cuda {

// Of this lane's (even token, odd token) and that of the lane 4 away, both of one token.
__device__ __forceinline__ float2 Exchange(float even_token, float odd_token) {
  const bool odd = threadIdx.x / 4 % 2;
  const float other = __shfl_xor_sync(~0u, odd ? even_token : odd_token, 4);
  return odd ? float2{other, odd_token} : float2{even_token, other};
}
__device__ __forceinline__ float Silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

template <typename E>
__device__ __forceinline__ float2 LoadPair(const E* from) {
  return Pair<E>(*reinterpret_cast<const uint32_t*>(from));
}

// Groups of 8 tokens: [begin, end).
struct Groups {
  int begin, end;
  __device__ __forceinline__ bool Has(int j) const { return begin <= j && j < end; }
};

// What a warp does with sums of a tile once they are complete. Lanes 4 apart exchange sums, so that
// each has pairs of columns of one token: `column` and the next, and with two halves the same 8
// further on.
template <typename Shape>
struct Finisher {
  using E = typename Shape::Element;
  static constexpr int kTokens = Shape::kTokens, kGroups = kTokens / 8;
  const ChainParameters& p;
  const ChainPhase& phase;
  ChainShared<Shape>& s;
  int warp, lane, column, square_row;
  int first_token, tokens;  // of this lane: token 8 j + first_token is one if 8 j < tokens
  bool inside[2];
  float2 factor[2];

  __device__ Finisher(const ChainParameters& parameters, const ChainPhase& of,
                      ChainShared<Shape>& shared, int tile)
      : p(parameters), phase(of), s(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    square_row = tile * kChainWarps + warp;
    column = phase.step == ChainStep::kSwiGlu ? square_row * 8 + lane / 8 * 2
                                              : square_row * 16 + lane / 8 * 2;
    first_token = lane % 4 * 2 + lane / 4 % 2, tokens = p.rows - first_token;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inside[h] = column + 8 * h < phase.columns;
      factor[h] = {0.f, 0.f};
      if (phase.factor != nullptr && inside[h])
        factor[h] = LoadPair(static_cast<const E*>(phase.factor) + column + 8 * h);
    }
  }

  // cos and sin of a token, and its slot.
  struct Angles {
    float2 cosine, sine;
    int slot;
  };
  // What is read before the sums are there: what is added to them, or the first group's angles.
  struct Addends {
    float2 x[kGroups][2];
    Angles angles;
  };
  __device__ __forceinline__ void ReadAddends(const Groups& groups, Addends& addends) const {
    const bool has_addends = phase.step == ChainStep::kResidual;
    const float* from = phase.addend + first_token * phase.addend_stride + column;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        addends.x[j][h] = {0.f, 0.f};
        if (has_addends && groups.Has(j) && 8 * j < tokens && inside[h])
          addends.x[j][h] =
              __ldcg(reinterpret_cast<const float2*>(from + 8 * j * phase.addend_stride + 8 * h));
      }
    }
    addends.angles = {};
    if (phase.step == ChainStep::kRotate) addends.angles = ReadAngles(8 * groups.begin + warp);
  }

  __device__ __forceinline__ void Finish(const Groups& groups, const float (&sum)[kTokens / 2],
                                         const Addends& addends) const {
    if (phase.step == ChainStep::kSwiGlu) {
      FinishSwiGlu(groups, sum);
    } else if (phase.step == ChainStep::kResidual) {
      FinishResidual(groups, sum, addends);
    } else if (phase.step == ChainStep::kProject) {
      FinishProject(groups, sum);
    } else {
      FinishRotate(groups, sum, addends.angles);
    }
  }

 private:
  __device__ __forceinline__ void FinishSwiGlu(const Groups& groups,
                                               const float (&sum)[kTokens / 2]) const {
    E* to = static_cast<E*>(phase.out) + first_token * phase.out_stride + column;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (!groups.Has(j)) continue;
      const float* x = sum + 4 * j;
      const float2 scale = *reinterpret_cast<const float2*>(s.scales[0] + 8 * j + lane % 4 * 2);
      const float2 y = Exchange(Silu(x[0] * scale.x) * (x[2] * scale.x),
                                Silu(x[1] * scale.y) * (x[3] * scale.y));
      if (8 * j < tokens && inside[0]) StorePair(to + 8 * j * phase.out_stride, y);
    }
  }
  __device__ __forceinline__ void FinishProject(const Groups& groups,
                                                const float (&sum)[kTokens / 2]) const {
    E* to = static_cast<E*>(phase.out) + first_token * phase.out_stride + column;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (!groups.Has(j)) continue;
      const float scale = s.scales[1][8 * j + first_token];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 y = Exchange(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]);
        if (8 * j < tokens && inside[h])
          StorePair(to + 8 * j * phase.out_stride + 8 * h,
                    {y.x * scale + factor[h].x, y.y * scale + factor[h].y});
      }
    }
  }
  __device__ __forceinline__ void FinishResidual(const Groups& groups,
                                                 const float (&sum)[kTokens / 2],
                                                 const Addends& addends) const {
    float* to = static_cast<float*>(phase.out) + first_token * phase.out_stride + column;
    E* normed = static_cast<E*>(phase.normed) + first_token * phase.normed_stride + column;
    const bool norms = phase.normed != nullptr;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (!groups.Has(j)) continue;
      float squares = 0.f;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 x = addends.x[j][h];
        float2 y = Exchange(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]);
        y.x += x.x, y.y += x.y;
        squares += y.x * y.x + y.y * y.y;
        if (8 * j >= tokens || !inside[h]) continue;
        *reinterpret_cast<float2*>(to + 8 * j * phase.out_stride + 8 * h) = y;
        if (norms)
          StorePair(normed + 8 * j * phase.normed_stride + 8 * h,
                    {y.x * factor[h].x * kNormedUnit<E>, y.y * factor[h].y * kNormedUnit<E>});
      }
      squares += __shfl_xor_sync(~0u, squares, 8);
      squares += __shfl_xor_sync(~0u, squares, 16);
      if (lane < 8) p.squares[square_row * kTokens + 8 * j + first_token] = squares;
    }
  }

  // A lane has columns 2 i, + 1 of a head's halves; a tile has one head or two.
  __device__ __forceinline__ int Lanes() const { return p.rotation.head_dim / 4; }
  __device__ __forceinline__ int Head() const {
    return square_row / kChainWarps * (kTileRows / p.rotation.head_dim) + lane / Lanes();
  }
  __device__ __forceinline__ Angles ReadAngles(int token) const {
    const ChainRotation& r = p.rotation;
    const int i = lane % Lanes();
    if (token >= p.rows) return {};
    const auto* angles = reinterpret_cast<const float2*>(
        r.rope + r.positions[token] * static_cast<int64_t>(r.head_dim));
    return {angles[i], angles[i + Lanes()], r.kv_slots != nullptr ? r.kv_slots[token] : -1};
  }
  __device__ __forceinline__ void FinishRotate(const Groups& groups,
                                               const float (&sum)[kTokens / 2],
                                               Angles angles) const {
#pragma unroll 1
    for (int j = groups.begin; j < groups.end; ++j) {
      const Angles of_next = j + 1 < groups.end ? ReadAngles(8 * (j + 1) + warp) : Angles{};
      float x[4] = {sum[0], sum[1], sum[2], sum[3]};
#pragma unroll
      for (int i = 4; i < kTokens / 2; ++i)
        if (i / 4 == j) x[i % 4] = sum[i];
      const float scale = s.scales[1][8 * j + first_token];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 y = Exchange(x[2 * h], x[2 * h + 1]);
        *reinterpret_cast<float2*>(&s.heads[first_token][column % kTileRows + 8 * h]) = {
            y.x * scale + factor[h].x, y.y * scale + factor[h].y};
      }
      NamedSync(1, kChainMultipliers);
      if (8 * j + warp < p.rows) RotateHeads(8 * j + warp, angles);
      angles = of_next;
      NamedSync(1, kChainMultipliers);
    }
  }
  // A token's heads of this tile, by one warp.
  __device__ __forceinline__ void RotateHeads(int token, const Angles& angles) const {
    const ChainRotation& r = p.rotation;
    const int half = r.head_dim / 2, i = lane % Lanes(), head = Head();
    const float* from = s.heads[warp] + lane / Lanes() * r.head_dim + 2 * i;
    float2 a = *reinterpret_cast<const float2*>(from);
    float2 b = *reinterpret_cast<const float2*>(from + half);
    const bool is_q = head < r.q_heads, is_v = head >= r.q_heads + r.kv_heads;
    const auto* norm = static_cast<const E*>(is_q ? r.q_norm : r.k_norm);
    float squares = a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
    for (int d = 1; d < Lanes(); d *= 2) squares += __shfl_xor_sync(~0u, squares, d);
    if (norm != nullptr && !is_v) {
      const float rstd = rsqrtf(squares / static_cast<float>(r.head_dim) + p.eps);
      const float2 na = LoadPair(norm + 2 * i), nb = LoadPair(norm + half + 2 * i);
      a.x *= rstd * na.x, a.y *= rstd * na.y, b.x *= rstd * nb.x, b.y *= rstd * nb.y;
    }
    if (!is_v) {
      const float2 cosine = angles.cosine, sine = angles.sine, x = a;
      a = {x.x * cosine.x - b.x * sine.x, x.y * cosine.y - b.y * sine.y};
      b = {b.x * cosine.x + x.x * sine.x, b.y * cosine.y + x.y * sine.y};
    }
    if (head >= r.q_heads + 2 * r.kv_heads) return;
    const uint32_t first = PackPair<E>(a.x, a.y), second = PackPair<E>(b.x, b.y);
    const auto store = [&](E* to) {
      *reinterpret_cast<uint32_t*>(to) = first, *reinterpret_cast<uint32_t*>(to + half) = second;
    };
    store(static_cast<E*>(phase.out) + token * phase.out_stride + head * r.head_dim + 2 * i);
    if (is_q || angles.slot < 0) return;
    const int kv_head = head - r.q_heads - (is_v ? r.kv_heads : 0);
    store(static_cast<E*>(is_v ? r.page_v : r.page_k) +
          (static_cast<int64_t>(angles.slot) * r.kv_heads + kv_head) * r.head_dim + 2 * i);
  }
  static __device__ __forceinline__ void StorePair(E* to, float2 y) {
    *reinterpret_cast<uint32_t*>(to) = PackPair<E>(y.x, y.y);
  }
};

}  // namespace coppice::cuda
