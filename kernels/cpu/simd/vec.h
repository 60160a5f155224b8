// Vec: COPPICE_LANES floats and the few functions on them that the kernels need, by the vector
// extension of GCC and clang: the same source becomes SSE2, AVX2 or AVX-512 code. Include from
// simd/ only; everything is local to the including file, because that file is compiled with
// instructions that other files must not inherit.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace {

constexpr int64_t kLanes = COPPICE_LANES;
typedef float Vec __attribute__((vector_size(4 * COPPICE_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * COPPICE_LANES)));

inline Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// The first `count` lanes; the others are zero and not touched.
inline Vec Load(const float* p, int64_t count) {
  if (count == kLanes) return Load(p);
  Vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}
inline void Store(float* p, Vec v, int64_t count) {
  if (count == kLanes) return Store(p, v);
  std::memcpy(p, &v, count * sizeof(float));
}

inline Vec Set(float x) { return x - Vec{}; }
inline Vec Max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec Min(Vec a, Vec b) { return a < b ? a : b; }

// Lanes [0, count) of v, `other` elsewhere.
inline Vec FirstLanes(Vec v, int64_t count, float other) {
  IntVec lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<int32_t>(i);
  return lane < static_cast<int32_t>(count) ? v : Set(other);
}

// Lane i of the result is lane from[i] of a and b, one behind the other. A template, so that clang
// may find that it has no such builtin.
template <typename V>
inline __attribute__((always_inline)) V Shuffle(V a, V b, IntVec from) {
  if constexpr (requires { __builtin_shuffle(a, b, from); }) {
    return __builtin_shuffle(a, b, from);
  } else {
    V v;
    for (int64_t i = 0; i < kLanes; ++i) v[i] = from[i] < kLanes ? a[from[i]] : b[from[i] - kLanes];
    return v;
  }
}

// v with lane i and lane i ^ W exchanged.
template <int64_t W>
inline Vec Exchange(Vec v) {
  IntVec other;
  for (int64_t i = 0; i < kLanes; ++i) other[i] = static_cast<int32_t>(i ^ W);
  return Shuffle(v, v, other);
}

// Over all lanes, pairwise.
template <int64_t W = kLanes / 2>
inline float Sum(Vec v) {
  v += Exchange<W>(v);
  if constexpr (W == 1) {
    return v[0];
  } else {
    return Sum<W / 2>(v);
  }
}
template <int64_t W = kLanes / 2>
inline float MaxLane(Vec v) {
  v = Max(v, Exchange<W>(v));
  if constexpr (W == 1) {
    return v[0];
  } else {
    return MaxLane<W / 2>(v);
  }
}

// Sums neighbouring halves: each group of 2 * W lanes of a, then of b, becomes W lanes.
template <int64_t W>
inline Vec FoldPairs(Vec a, Vec b) {
  IntVec low, high;
  for (int64_t i = 0; i < kLanes; ++i) {
    low[i] = static_cast<int32_t>(i / W * 2 * W + i % W);
    high[i] = low[i] + static_cast<int32_t>(W);
  }
  return Shuffle(a, b, low) + Shuffle(a, b, high);
}

// Lane i of the result is the sum of the lanes of v[i], i < kLanes, in the same order for each i.
template <int64_t W = kLanes / 2>
inline __attribute__((always_inline)) Vec SumEach(const Vec* v) {
  Vec folded[W];
#pragma GCC unroll 16
  for (int64_t i = 0; i < W; ++i) folded[i] = FoldPairs<W>(v[2 * i], v[2 * i + 1]);
  if constexpr (W == 1) {
    return folded[0];
  } else {
    return SumEach<W / 2>(folded);
  }
}

// Exchanges the off-diagonal quarters of every 2W x 2W block of the matrix whose rows are `rows`;
// all powers of two in turn transpose it.
template <int64_t W>
inline __attribute__((always_inline)) void SwapQuarters(Vec* rows) {
  IntVec low, high;
  for (int64_t i = 0; i < kLanes; ++i) {
    const bool right = (i & W) != 0;
    low[i] = static_cast<int32_t>(right ? kLanes + i - W : i);
    high[i] = static_cast<int32_t>(right ? kLanes + i : i + W);
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    if ((i & W) != 0) continue;
    const Vec a = rows[i], b = rows[i + W];
    rows[i] = Shuffle(a, b, low);
    rows[i + W] = Shuffle(a, b, high);
  }
}

inline __attribute__((always_inline)) void Transpose(Vec* rows) {
  SwapQuarters<1>(rows);
  SwapQuarters<2>(rows);
  if constexpr (kLanes >= 8) SwapQuarters<4>(rows);
  if constexpr (kLanes >= 16) SwapQuarters<8>(rows);
}

// exp(x) to about 1 ulp (relative 1.2e-7): x = n ln 2 + r, |r| <= ln 2 / 2, 2^n by the exponent
// bits, e^r by a polynomial of degree 6 (coefficients of Cephes expf, Moshier). exp(0) == 1; below
// -87.3 (denormal results) the answer is 0; above 88.4 it saturates near FLT_MAX; NaN stays NaN.
inline Vec Exp(Vec x) {
  const Vec clamped = Max(Min(x, Set(88.37f)), Set(-87.33f));
  const Vec rounder = Set(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = (clamped * 1.44269504088896341f + rounder) - rounder;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &exponent, sizeof(scale));
  const Vec result = x < -87.33f ? Vec{} : p * scale;
  return x == x ? result : x;
}

// Calls fn(i, count) for chunks of kLanes elements and once more for a shorter rest.
template <typename Fn>
inline __attribute__((always_inline)) void ForLanes(int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) fn(i, kLanes);
  if (i < n) fn(i, n - i);
}

}  // namespace
