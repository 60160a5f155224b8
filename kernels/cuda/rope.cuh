// What rope.cu and rope_backward.cu share: a group of lanes of one warp holds a head of a row. Lane
// l has columns [(run * kLanes + l) * N, + N) of both halves, which rotate as pairs.
#pragma once

#include "kernels/cuda/common.cuh"

namespace coppice::cuda {

template <typename E>
__device__ inline E* HeadOf(const TensorView& t, int64_t row, int64_t head) {
  return RowOf<E>(t, row) + head * t.stride[1];
}

// Sum over a group of neighbouring lanes, for each of them. Other groups of the warp may be
// elsewhere.
template <int kLanes>
__device__ inline float GroupSum(float x) {
  constexpr unsigned kGroup = kLanes == 32 ? ~0u : (1u << kLanes % 32) - 1;
  const unsigned mask = kGroup << threadIdx.x % 32 / kLanes * kLanes;
  for (int d = kLanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(mask, x, d);
  return x;
}

// N neighbours of 16 bits as they lie in memory, two to a word: a register each two until they are
// needed.
template <typename E, int N>
struct Columns {
  static_assert(N == 1 || N == 8);
  uint32_t words[(N + 1) / 2] = {};

  __device__ void Read(const E* x) {
    if constexpr (N == 1) {
      words[0] = *reinterpret_cast<const uint16_t*>(x);
    } else {
      const uint4 all = *reinterpret_cast<const uint4*>(x);
      words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    }
  }
  __device__ float operator[](int j) const {
    const float2 pair = Pair<E>(words[j / 2]);
    return j % 2 == 0 ? pair.x : pair.y;
  }
};

// Where a lane's runs of columns start in each half.
template <int N, int kLanes>
struct LaneColumns {
  static __device__ int At(int run, int lane) { return (run * kLanes + lane) * N; }
  // True for every run of a head whose lanes fill it exactly.
  static __device__ bool Has(int run, int lane, int half) { return N > 1 || At(run, lane) < half; }
};

// A lane's share of a head.
template <typename E, int N, int kLanes, int kRuns>
struct HeadShare {
  Columns<E, N> a[kRuns], b[kRuns];
  using Lane = LaneColumns<N, kLanes>;

  __device__ void Read(const E* x, int half, int lane) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int c = Lane::At(r, lane);
      a[r] = b[r] = {};
      if (!Lane::Has(r, lane, half)) continue;
      a[r].Read(x + c), b[r].Read(x + half + c);
    }
  }
};

// cos and sin of a lane's columns at one position.
template <int N, int kLanes, int kRuns>
struct Angles {
  Pack<float, N> cosine[kRuns], sine[kRuns];

  __device__ void Read(const float* cos_sin, int half, int lane) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      cosine[r] = sine[r] = {};
      const int c = LaneColumns<N, kLanes>::At(r, lane);
      if (!LaneColumns<N, kLanes>::Has(r, lane, half)) continue;
      cosine[r] = Load<float, N>(cos_sin + c);
      sine[r] = Load<float, N>(cos_sin + half + c);
    }
  }
};

// N columns, rounded, as one store.
template <typename E, int N>
__device__ inline void StoreRounded(E* to, const float (&x)[N]) {
  if constexpr (N == 1) {
    *to = FromFloat<E>(x[0]);
  } else {
    Pack<E, N> bits;
#pragma unroll
    for (int j = 0; j < N; ++j) bits.v[j] = FromFloat<E>(x[j]);
    Store<E, N>(to, bits);
  }
}

// The share in f32.
template <typename E, int N, int kLanes, int kRuns>
struct HeadValues {
  using Bits = HeadShare<E, N, kLanes, kRuns>;
  using Lane = LaneColumns<N, kLanes>;
  float a[kRuns][N], b[kRuns][N];

  __device__ void Set(const Bits& bits) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        a[r][j] = bits.a[r][j];
        b[r][j] = bits.b[r][j];
      }
    }
  }
  __device__ void Write(E* x, int half, int lane) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int c = Lane::At(r, lane);
      if (!Lane::Has(r, lane, half)) continue;
      StoreRounded(x + c, a[r]);
      StoreRounded(x + half + c, b[r]);
    }
  }
  __device__ float SumSquares() const {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int j = 0; j < N; ++j) sum += a[r][j] * a[r][j] + b[r][j] * b[r][j];
    }
    return GroupSum<kLanes>(sum);
  }
  // By the angles times kSign, 1 or -1: (a, b) -> (a cos - b sin, b cos + a sin).
  template <int kSign>
  __device__ void Rotate(const Angles<N, kLanes, kRuns>& angles) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float x = a[r][j], cosine = angles.cosine[r].v[j], sine = kSign * angles.sine[r].v[j];
        a[r][j] = x * cosine - b[r][j] * sine;
        b[r][j] = b[r][j] * cosine + x * sine;
      }
    }
  }
};

// Host: rows, heads and halves at 16-byte boundaries, or absent.
inline bool WideHeads(const TensorView& t) {
  return t.rank == 0 || (Aligned16(t) && t.shape[t.rank - 1] % 16 == 0);
}

}  // namespace coppice::cuda
