// How the blocks of layer_chain.cu add up a tile's sums, and what becomes of them.
//
// Sums travel through memory that holds kNothing before they come and after they were taken: a word
// that is something else has come, so no flag and no fence is needed.
#pragma once

#include "kernels/cuda/layer_chain.cuh"

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
  return __float_as_uint(x.x) == kNothing || __float_as_uint(x.y) == kNothing ||
         __float_as_uint(x.z) == kNothing || __float_as_uint(x.w) == kNothing;
}

// Of this lane's (even token, odd token) and that of the lane 4 away, both of one token.
__device__ __forceinline__ float2 Exchange(float even_token, float odd_token) {
  const bool odd = threadIdx.x / 4 % 2;
  const float other = __shfl_xor_sync(~0u, odd ? even_token : odd_token, 4);
  return odd ? float2{other, odd_token} : float2{even_token, other};
}
__device__ __forceinline__ float Silu(float x) { return x / (1.f + __expf(-x)); }

template <typename E>
__device__ __forceinline__ float2 LoadPair(const E* from) {
  return Pair<E>(*reinterpret_cast<const uint32_t*>(from));
}

// What a warp does with sums of a tile once they are complete. Lanes 4 apart exchange sums, so that
// each has pairs of columns of one token: `column` and the next, and with two halves the same 8
// further on.
template <typename Shape>
struct Finisher {
  using E = typename Shape::Element;
  const ChainParameters& p;
  const ChainPhase& phase;
  ChainShared<Shape>& s;
  int warp, lane, column, square_row;
  float2 factor[2];

  __device__ Finisher(const ChainParameters& parameters, const ChainPhase& of,
                      ChainShared<Shape>& shared, int tile)
      : p(parameters), phase(of), s(shared), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    square_row = tile * kChainWarps + warp;
    column = phase.step == ChainStep::kSwiGlu ? square_row * 8 + lane / 8 * 2
                                              : square_row * 16 + lane / 8 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      factor[h] = {0.f, 0.f};
      if (phase.factor != nullptr && column + 8 * h < phase.columns)
        factor[h] = LoadPair(static_cast<const E*>(phase.factor) + column + 8 * h);
    }
  }

  __device__ __forceinline__ int Token(int j) const { return 8 * j + lane % 4 * 2 + lane / 4 % 2; }

  // Memory that finishing a group takes, read before its sums are there: what is added to them, or
  // cos and sin of this warp's token and the token's slot.
  struct Addend {
    float2 x[2];
    int slot;
  };
  __device__ __forceinline__ Addend ReadAddend(int j) const {
    Addend addend = {};
    if (phase.step == ChainStep::kRotate) return ReadAngles(j);
    if (phase.step != ChainStep::kResidual || Token(j) >= p.rows) return addend;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (column + 8 * h < phase.columns)
        addend.x[h] = __ldcg(reinterpret_cast<const float2*>(
            phase.addend + Token(j) * phase.addend_stride + column + 8 * h));
    }
    return addend;
  }

  __device__ __forceinline__ void Finish(int j, float4 sum, const Addend& addend) const {
    if (phase.step == ChainStep::kSwiGlu) {
      FinishSwiGlu(j, sum);
    } else {
      float2 y[2] = {Exchange(sum.x, sum.y), Exchange(sum.z, sum.w)};
      if (phase.step == ChainStep::kResidual) {
        FinishResidual(j, y, addend);
      } else if (phase.step == ChainStep::kProject) {
        FinishProject(j, y);
      } else {
        FinishRotate(j, y, addend);
      }
    }
  }

 private:
  // A lane has columns 2 i, + 1 of a head's halves; a tile has one head or two.
  __device__ __forceinline__ int Lanes() const { return p.rotation.head_dim / 4; }
  __device__ __forceinline__ int Head() const {
    return square_row / kChainWarps * (kTileRows / p.rotation.head_dim) + lane / Lanes();
  }
  __device__ __forceinline__ Addend ReadAngles(int j) const {
    const ChainRotation& r = p.rotation;
    const int token = 8 * j + warp, i = lane % Lanes();
    if (token >= p.rows) return {};
    const auto* angles = reinterpret_cast<const float2*>(
        r.rope + r.positions[token] * static_cast<int64_t>(r.head_dim));
    return {{angles[i], angles[i + Lanes()]}, r.kv_slots != nullptr ? r.kv_slots[token] : -1};
  }
  __device__ __forceinline__ void FinishRotate(int j, const float2 (&y)[2],
                                               const Addend& angles) const {
    const float scale = s.scales[1][Token(j)];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      *reinterpret_cast<float2*>(&s.heads[Token(j) % 8][column % kTileRows + 8 * h]) = {
          y[h].x * scale + factor[h].x, y[h].y * scale + factor[h].y};
    NamedSync(1, kChainMultipliers);
    if (8 * j + warp < p.rows) RotateHeads(8 * j + warp, angles);
    NamedSync(1, kChainMultipliers);
  }
  // A token's heads of this tile, by one warp.
  __device__ __forceinline__ void RotateHeads(int token, const Addend& angles) const {
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
      const float2 cosine = angles.x[0], sine = angles.x[1], x = a;
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
  __device__ __forceinline__ void FinishSwiGlu(int j, float4 sum) const {
    const float2 scale = *reinterpret_cast<const float2*>(s.scales[0] + 8 * j + lane % 4 * 2);
    const float2 y = Exchange(Silu(sum.x * scale.x) * (sum.z * scale.x),
                              Silu(sum.y * scale.y) * (sum.w * scale.y));
    StorePair(phase.out, phase.out_stride, j, 0, y);
  }
  __device__ __forceinline__ void FinishProject(int j, const float2 (&y)[2]) const {
    const float scale = s.scales[1][Token(j)];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      StorePair(phase.out, phase.out_stride, j, h,
                {y[h].x * scale + factor[h].x, y[h].y * scale + factor[h].y});
  }
  __device__ __forceinline__ void FinishResidual(int j, float2 (&y)[2],
                                                 const Addend& addend) const {
    float squares = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      y[h].x += addend.x[h].x, y[h].y += addend.x[h].y;
      squares += y[h].x * y[h].x + y[h].y * y[h].y;
      if (Token(j) < p.rows && column + 8 * h < phase.columns)
        *reinterpret_cast<float2*>(static_cast<float*>(phase.out) + Token(j) * phase.out_stride +
                                   column + 8 * h) = y[h];
      if (phase.normed != nullptr)
        StorePair(phase.normed, phase.normed_stride, j, h,
                  {y[h].x * factor[h].x * kNormedUnit<E>, y[h].y * factor[h].y * kNormedUnit<E>});
    }
    squares += __shfl_xor_sync(~0u, squares, 8);
    squares += __shfl_xor_sync(~0u, squares, 16);
    if (lane < 8) p.squares[square_row * Shape::kTokens + Token(j)] = squares;
  }
  __device__ __forceinline__ void StorePair(void* to, int64_t stride, int j, int h,
                                            float2 y) const {
    if (Token(j) < p.rows && column + 8 * h < phase.columns)
      *reinterpret_cast<uint32_t*>(static_cast<E*>(to) + Token(j) * stride + column + 8 * h) =
          PackPair<E>(y.x, y.y);
  }
};

// A tile's sums from its pieces.
template <typename Shape>
struct Adder {
  static constexpr int kTokens = Shape::kTokens, kGroups = kTokens / 8;
  const ChainParameters& p;
  const Piece& piece;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  __device__ __forceinline__ float4* At(int i, int j) const {
    return p.pieces + (piece.Place(i) * kTokens + 8 * j + warp) * 32 + lane;
  }
  // To those that add them.
  __device__ __forceinline__ void Send(const float (&sum)[kTokens / 2]) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (j * piece.adders / kGroups == piece.index) continue;
      StoreWords(At(piece.index, j), Something(sum[4 * j]), Something(sum[4 * j + 1]),
                 Something(sum[4 * j + 2]), Something(sum[4 * j + 3]));
    }
  }
  // The first group that adder i has.
  __device__ __forceinline__ int FirstOf(int i) const {
    return (i * kGroups + piece.adders - 1) / piece.adders;
  }
  static __device__ __forceinline__ float4 Own(const float (&sum)[kTokens / 2], int j) {
    float4 x = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i)
      if (i == j) x = {sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
    return x;
  }
  // Groups [j, j + units) over all pieces, in their order.
  template <int kPieces, int kUnits>
  __device__ __forceinline__ void Add(const float (&sum)[kTokens / 2], int j, int units,
                                      float4 (&total)[kUnits]) const {
#pragma unroll
    for (float4& x : total) x = {0.f, 0.f, 0.f, 0.f};
    for (int i = 0; i < piece.count; i += kPieces) {
      float4 x[kUnits][kPieces];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
          x[u][k] = {0.f, 0.f, 0.f, 0.f};
          if (u < units && i + k < piece.count)
            x[u][k] = i + k == piece.index ? Own(sum, j + u) : LoadSums(At(i + k, j + u));
        }
      }
      for (bool all = false; !all;) {  // what has not come is read again, together
        all = true;
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
#pragma unroll
          for (int k = 0; k < kPieces; ++k) {
            if (i + k == piece.index || !IsMissing(x[u][k])) continue;
            all = false;
            x[u][k] = LoadSums(At(i + k, j + u));
          }
        }
      }
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int k = 0; k < kPieces; ++k) {
          const float4 y = x[u][k];
          total[u].x += y.x, total[u].y += y.y, total[u].z += y.z, total[u].w += y.w;
          if (u < units && i + k < piece.count && i + k != piece.index) Empty(At(i + k, j + u));
        }
      }
    }
  }
  static __device__ __forceinline__ void Empty(float4* place) {
    StoreWords(place, kNothing, kNothing, kNothing, kNothing);
  }
};

// The groups that this block adds up, kUnits at a time.
template <int kPieces, int kUnits, typename Shape>
__device__ __forceinline__ void AddUnits(const Adder<Shape>& adder, const Finisher<Shape>& finisher,
                                         const float (&sum)[Shape::kTokens / 2], int begin,
                                         int end) {
  for (int j = begin; j < end; j += kUnits) {
    typename Finisher<Shape>::Addend addend[kUnits];  // read before the sums are there
    float4 total[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      if (j + u < end) addend[u] = finisher.ReadAddend(j + u);
    adder.template Add<kPieces, kUnits>(sum, j, end - j, total);
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
      if (j + u < end) finisher.Finish(j + u, total[u], addend[u]);
  }
}

// The same of tiles that one or two blocks have: a sum of two has no order.
template <typename Shape>
__device__ __forceinline__ void AddPair(const Adder<Shape>& adder, const Finisher<Shape>& finisher,
                                        const float (&sum)[Shape::kTokens / 2], int begin,
                                        int end) {
  constexpr int kUnits = Shape::kTokens / 8;
  const int other = 1 - adder.piece.index;
  float4 x[kUnits];
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    x[j] = {0.f, 0.f, 0.f, 0.f};
    if (begin <= j && j < end && adder.piece.count == 2) x[j] = LoadSums(adder.At(other, j));
  }
  for (bool all = false; !all;) {
    all = true;
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
      if (!IsMissing(x[j])) continue;
      all = false;
      x[j] = LoadSums(adder.At(other, j));
    }
  }
#pragma unroll
  for (int j = 0; j < kUnits; ++j) {
    if (j < begin || j >= end) continue;
    const typename Finisher<Shape>::Addend addend = finisher.ReadAddend(j);
    if (adder.piece.count == 2) adder.Empty(adder.At(other, j));
    const float* own = sum + 4 * j;
    finisher.Finish(j, {own[0] + x[j].x, own[1] + x[j].y, own[2] + x[j].z, own[3] + x[j].w},
                    addend);
  }
}

template <typename Shape>
__device__ __forceinline__ void FinishPiece(const ChainParameters& p, const ChainPhase& phase,
                                            ChainShared<Shape>& s, const Piece& piece,
                                            const float (&sum)[Shape::kTokens / 2]) {
  const Adder<Shape> adder = {p, piece};
  if (piece.count > 1) adder.Send(sum);
  if (piece.index >= piece.adders) return;
  const int begin = adder.FirstOf(piece.index), end = adder.FirstOf(piece.index + 1);
  const Finisher<Shape> finisher(p, phase, s, piece.tile);
  if (piece.count <= 2) {
    AddPair(adder, finisher, sum, begin, end);
  } else {
    AddUnits<Shape::kPieces, Shape::kUnits>(adder, finisher, sum, begin, end);
  }
}

}  // namespace coppice::cuda
