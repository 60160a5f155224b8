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
// each has pairs of columns of one token: `column` and the next, and but for SwiGLU the same
// `apart` further on.
template <typename Shape>
struct Finisher {
  using E = typename Shape::Element;
  static constexpr int kTokens = Shape::kTokens, kGroups = kTokens / 8;
  const ChainParameters& p;
  const ChainPhase& phase;
  ChainShared<Shape>& s;
  int warp, lane, column, apart, square_row;
  int head;                 // kRotate
  int first_token, tokens;  // of this lane: token 8 j + first_token is one if 8 j < tokens
  bool inside[2];
  float2 factor[2];

  __device__ Finisher(const ChainParameters& parameters, const ChainPhase& of,
                      ChainShared<Shape>& shared, int tile)
      : p(parameters), phase(of), s(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    square_row = tile * kChainWarps + warp;
    const bool halves = phase.step == ChainStep::kSwiGlu || phase.step == ChainStep::kRotate;
    column = square_row * (halves ? 8 : 16) + lane / 8 * 2, apart = 8, head = 0;
    if (phase.step == ChainStep::kRotate) {
      apart = p.rotation.head_dim / 2, head = square_row / (apart / 8);
      column += head * apart;
    }
    first_token = lane % 4 * 2 + lane / 4 % 2, tokens = p.rows - first_token;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      inside[h] = column + apart * h < phase.columns;
      factor[h] = {0.f, 0.f};
      if (phase.factor != nullptr && inside[h])
        factor[h] = LoadPair(static_cast<const E*>(phase.factor) + column + apart * h);
    }
  }

  // What is read before the sums are there: what is added to them, or cos and sin of the token.
  struct Addends {
    float2 x[kGroups][2];
  };
  __device__ __forceinline__ void ReadAddends(const Groups& groups, Addends& addends) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) addends.x[j][0] = addends.x[j][1] = {0.f, 0.f};
    if (phase.step == ChainStep::kRotate) ReadAngles(groups, addends);
    if (phase.step != ChainStep::kResidual) return;
    const float* from = phase.addend + first_token * phase.addend_stride + column;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (groups.Has(j) && 8 * j < tokens && inside[h])
          addends.x[j][h] =
              __ldcg(reinterpret_cast<const float2*>(from + 8 * j * phase.addend_stride + 8 * h));
      }
    }
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
      FinishRotate(groups, sum, addends);
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

  // kRotate: a lane has two columns of a head's first half and the same two of its second.
  __device__ __forceinline__ bool IsValue() const {
    return head >= p.rotation.q_heads + p.rotation.kv_heads;
  }
  __device__ __forceinline__ int ColumnOfHead() const {
    return column - head * p.rotation.head_dim;
  }
  // Words of all tokens: lane l has those of tokens 32 k + l.
  static constexpr int kTokenWords = (kTokens + 31) / 32;
  struct TokenWords {
    int word[kTokenWords];
  };
  __device__ __forceinline__ TokenWords ReadTokens(const int32_t* from, int otherwise) const {
    TokenWords words;
#pragma unroll
    for (int k = 0; k < kTokenWords; ++k)
      words.word[k] = from != nullptr && 32 * k + lane < p.rows ? from[32 * k + lane] : otherwise;
    return words;
  }
  // That of this lane's token of group j.
  __device__ __forceinline__ int OfToken(const TokenWords& words, int j) const {
    return __shfl_sync(~0u, words.word[j / 4], (8 * j + first_token) % 32);
  }
  // Values keep what they have: cos 1, sin 0.
  __device__ __forceinline__ void ReadAngles(const Groups& groups, Addends& addends) const {
    const ChainRotation& r = p.rotation;
    const TokenWords positions = ReadTokens(r.positions, 0);
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      const int position = OfToken(positions, j);
      addends.x[j][0] = {1.f, 1.f};
      if (IsValue() || !groups.Has(j) || 8 * j >= tokens) continue;
      const float* from = r.rope + position * static_cast<int64_t>(r.head_dim) + ColumnOfHead();
#pragma unroll
      for (int h = 0; h < 2; ++h)
        addends.x[j][h] = *reinterpret_cast<const float2*>(from + h * apart);
    }
  }
  struct HeadNorm {
    bool has;
    uint32_t weights[2];
  };
  __device__ __forceinline__ HeadNorm ReadHeadNorm() const {
    const ChainRotation& r = p.rotation;
    const auto* from = static_cast<const E*>(head < r.q_heads ? r.q_norm
                                             : IsValue()      ? nullptr
                                                              : r.k_norm);
    HeadNorm norm = {from != nullptr, {PackPair<E>(1.f, 1.f), PackPair<E>(1.f, 1.f)}};
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (norm.has)
        norm.weights[h] = *reinterpret_cast<const uint32_t*>(from + ColumnOfHead() + h * apart);
    return norm;
  }
  __device__ __forceinline__ void FinishRotate(const Groups& groups,
                                               const float (&sum)[kTokens / 2],
                                               const Addends& addends) const {
    constexpr int kTurn = kGroups < 2 ? kGroups : 2;  // groups together: what registers take
    const HeadNorm norm = ReadHeadNorm();
    const TokenWords slots =
        ReadTokens(head < p.rotation.q_heads ? nullptr : p.rotation.kv_slots, -1);
#pragma unroll
    for (int first = 0; first < kGroups; first += kTurn) {
      if (groups.end <= first || first + kTurn <= groups.begin) continue;
      float2 y[kTurn][2];
#pragma unroll
      for (int i = 0; i < kTurn; ++i)
        if (groups.Has(first + i)) ScaleHeads(first + i, sum, y[i]);
      NamedSync(1, kChainMultipliers);
#pragma unroll
      for (int i = 0; i < kTurn; ++i)
        if (groups.Has(first + i))
          RotateHeads(first + i, y[i], addends.x[first + i], norm, OfToken(slots, first + i));
    }
    NamedSync(1, kChainMultipliers);  // the squares may be written again
  }
  __device__ __forceinline__ void ScaleHeads(int j, const float (&sum)[kTokens / 2],
                                             float2 (&y)[2]) const {
    const float scale = s.scales[1][8 * j + first_token];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 x = Exchange(sum[4 * j + 2 * h], sum[4 * j + 2 * h + 1]);
      y[h] = {x.x * scale + factor[h].x, x.y * scale + factor[h].y};
    }
    float squares = y[0].x * y[0].x + y[0].y * y[0].y + y[1].x * y[1].x + y[1].y * y[1].y;
    squares += __shfl_xor_sync(~0u, squares, 8);
    squares += __shfl_xor_sync(~0u, squares, 16);
    if (lane < 8) s.squares[8 * j + first_token][warp] = squares;
  }
  // From the squares of all of the head's warps.
  __device__ __forceinline__ float HeadRstd(int token) const {
    const auto* squares = reinterpret_cast<const float4*>(s.squares[token]);
    const float4 a = squares[0], b = squares[1];
    const float first = (a.x + a.y) + (a.z + a.w), second = (b.x + b.y) + (b.z + b.w);
    const float mean =
        apart == 64 ? (first + second) * 0x1p-7f : (warp < 4 ? first : second) * 0x1p-6f;
    return rsqrtf(mean + p.eps);
  }
  __device__ __forceinline__ void RotateHeads(int j, const float2 (&y)[2],
                                              const float2 (&angles)[2], const HeadNorm& norm,
                                              int slot) const {
    const ChainRotation& r = p.rotation;
    const float rstd = norm.has ? HeadRstd(8 * j + first_token) : 1.f;
    const float2 na = Pair<E>(norm.weights[0]), nb = Pair<E>(norm.weights[1]);
    const float2 cosine = angles[0], sine = angles[1];
    const float2 x = {y[0].x * (rstd * na.x), y[0].y * (rstd * na.y)};
    const float2 z = {y[1].x * (rstd * nb.x), y[1].y * (rstd * nb.y)};
    // Which product is rounded is said here, so that it is no compiler's choice.
    const float2 a = {fmaf(x.x, cosine.x, -(z.x * sine.x)), fmaf(x.y, cosine.y, -(z.y * sine.y))};
    const float2 b = {fmaf(z.x, cosine.x, x.x * sine.x), fmaf(z.y, cosine.y, x.y * sine.y)};
    if (8 * j >= tokens || !inside[1]) return;
    E* to = static_cast<E*>(phase.out) + (8 * j + first_token) * phase.out_stride + column;
    StorePair(to, a), StorePair(to + apart, b);
    if (slot < 0) return;
    const int first_head = IsValue() ? r.q_heads + r.kv_heads : r.q_heads;
    to = static_cast<E*>(IsValue() ? r.page_v : r.page_k) +
         (static_cast<int64_t>(slot) * r.kv_heads - first_head) * r.head_dim + column;
    StorePair(to, a), StorePair(to + apart, b);
  }
  static __device__ __forceinline__ void StorePair(E* to, float2 y) {
    *reinterpret_cast<uint32_t*>(to) = PackPair<E>(y.x, y.y);
  }
};

}  // namespace coppice::cuda
