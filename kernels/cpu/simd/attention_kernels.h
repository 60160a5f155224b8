// One tile of attention, forward and backward; shapes and meaning are in kernels.h, the algorithm
// around it in attention.cc and attention_backward.cc. Include from kernels.cc only.
#pragma once

#include <cmath>

#include "kernels/cpu/simd/gemm_kernels.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/vec.h"

namespace {

using coppice::cpu::AttentionBackwardTile;
using coppice::cpu::AttentionForwardTile;
using coppice::cpu::kTileKeys;

void PackRows(const float* const* vectors, int64_t n, int64_t head_dim, int64_t dim, float* dst) {
  for (int64_t i = 0; i < kTileKeys; ++i) {
    float* row = dst + i * dim;
    const int64_t filled = i < n ? head_dim : 0;
    if (filled > 0) std::memcpy(row, vectors[i], filled * sizeof(float));
    if (filled < dim) std::memset(row + filled, 0, (dim - filled) * sizeof(float));
  }
}

// Transposes blocks of kLanes keys by kLanes columns in registers.
void PackColumns(const float* const* vectors, int64_t n, int64_t head_dim, int64_t dim,
                 float* dst) {
  for (int64_t key = 0; key < kTileKeys; key += kLanes) {
    for (int64_t col = 0; col < dim; col += kLanes) {
      const int64_t width = head_dim - col < kLanes ? head_dim - col : kLanes;
      Vec block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = key + i < n && width > 0 ? Load(vectors[key + i] + col, width) : Vec{};
      }
      Transpose(block);
      for (int64_t i = 0; i < kLanes; ++i) Store(dst + (col + i) * kTileKeys + key, block[i]);
    }
  }
}

// c = a b for a [m, k] and b [k, kTileKeys], all dense.
inline void Scores(int64_t m, int64_t k, const float* a, const float* b, float* c) {
  std::memset(c, 0, m * kTileKeys * sizeof(float));
  TileGemm({m, kTileKeys, k, a, k, 1, b, c});
}

// Lanes [begin, begin + kLanes) of a row of scores, scaled, that lie below `visible`; the others
// become -inf.
inline Vec Masked(const float* scores, int64_t begin, float scale, int64_t visible) {
  const Vec v = Load(scores + begin) * scale;
  if (begin + kLanes <= visible) return v;
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  return FirstLanes(v, visible > begin ? visible - begin : 0, kMinusInf);
}

// Online softmax (Milakov & Gimelshein 2018): turns scores into exp(score - max) and rescales what
// was summed so far. A tile without a visible key leaves max, sum and out as they are, bit for bit.
inline void SoftmaxRow(const AttentionForwardTile& t, int64_t i) {
  float* scores = t.scores + i * kTileKeys;
  Vec best = Set(t.max[i]);
  for (int64_t j = 0; j < kTileKeys; j += kLanes)
    best = Max(best, Masked(scores, j, t.scale, t.visible[i]));
  const float max = MaxLane(best);
  Vec sum = {};
  for (int64_t j = 0; j < kTileKeys; j += kLanes) {
    const Vec e = Exp(Masked(scores, j, t.scale, t.visible[i]) - max);
    sum += e;
    Store(scores + j, e);
  }
  if (max > t.max[i]) {
    const float shrink = Exp(Set(t.max[i] - max))[0];
    t.max[i] = max;
    t.sum[i] *= shrink;
    float* out = t.out + i * t.dim;
    for (int64_t d = 0; d < t.dim; d += kLanes) Store(out + d, Load(out + d) * shrink);
  }
  t.sum[i] += Sum(sum);
}

void AttentionForward(const AttentionForwardTile& t) {
  Scores(t.m, t.dim, t.q, t.k_t, t.scores);
  for (int64_t i = 0; i < t.m; ++i) SoftmaxRow(t, i);
  TileGemm({t.m, t.dim, kTileKeys, t.scores, kTileKeys, 1, t.v, t.out});
}

// p = exp(scale * q.k - lse);  d_s = scale * p * (d_out.v - delta)
inline void GradientRow(const AttentionBackwardTile& t, int64_t i) {
  float* p = t.p + i * kTileKeys;
  float* d_s = t.d_s + i * kTileKeys;
  for (int64_t j = 0; j < kTileKeys; j += kLanes) {
    Vec prob = Exp(Load(p + j) * t.scale - t.lse[i]);
    if (j + kLanes > t.visible[i]) {
      prob = FirstLanes(prob, t.visible[i] > j ? t.visible[i] - j : 0, 0.0f);
    }
    Store(p + j, prob);
    Store(d_s + j, prob * (Load(d_s + j) - t.delta[i]) * t.scale);
  }
}

void AttentionBackward(const AttentionBackwardTile& t) {
  Scores(t.m, t.dim, t.q, t.k_t, t.p);
  Scores(t.m, t.dim, t.d_out, t.v_t, t.d_s);
  for (int64_t i = 0; i < t.m; ++i) GradientRow(t, i);
  if (t.d_q != nullptr) TileGemm({t.m, t.dim, kTileKeys, t.d_s, kTileKeys, 1, t.k, t.d_q});
  if (t.d_k != nullptr) {  // transposed: the rows of the result are keys
    TileGemm({kTileKeys, t.dim, t.m, t.d_s, 1, kTileKeys, t.q, t.d_k});
    TileGemm({kTileKeys, t.dim, t.m, t.p, 1, kTileKeys, t.d_out, t.d_v});
  }
}

}  // namespace
