// Backward of rotary positions and the per-head RMSNorm before them (rope.cu): the gradient is
// turned back, (a, b) -> (a cos + b sin, b cos - a sin), then goes through the norm
// (norm_backward.cu has the formula). A group of lanes takes a head of a row at a time, with the
// next one on its way, and keeps its share of the norm's gradient in registers. 6 bytes per
// element; bound by memory bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 396;  // three for each multiprocessor of an H200

// A lane's share of a head: N columns in each run of N * kLanes, in both halves.
template <int N, int kLanes, int kRuns>
struct HeadShare {
  Pack<bf16, N> a[kRuns], b[kRuns];

  static __device__ int Column(int run, int lane) { return (run * kLanes + lane) * N; }
  __device__ void Read(const bf16* x, int half, int lane) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      a[r] = b[r] = {};
      const int c = Column(r, lane);
      if (c >= half) continue;
      a[r] = Load<bf16, N>(x + c);
      b[r] = Load<bf16, N>(x + half + c);
    }
  }
  __device__ void Write(bf16* x, int half, int lane) const {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int c = Column(r, lane);
      if (c >= half) continue;
      Store<bf16, N>(x + c, a[r]);
      Store<bf16, N>(x + half + c, b[r]);
    }
  }
};

__device__ inline bf16* HeadOf(const TensorView& t, int64_t row, int64_t head) {
  return RowOf<bf16>(t, row) + head * t.stride[1];
}

template <int kLanes>
__device__ inline float GroupSum(float x) {
  for (int d = kLanes / 2; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// cos and sin of a lane's columns at one position.
template <int N, int kLanes, int kRuns>
struct Angles {
  Pack<float, N> cosine[kRuns], sine[kRuns];

  __device__ void Read(const float* cos_sin, int half, int lane) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      cosine[r] = sine[r] = {};
      const int c = HeadShare<N, kLanes, kRuns>::Column(r, lane);
      if (c >= half) continue;
      cosine[r] = Load<float, N>(cos_sin + c);
      sine[r] = Load<float, N>(cos_sin + half + c);
    }
  }
};

// A lane's columns in f32, and the two steps back.
template <int N, int kLanes, int kRuns>
struct HeadGradient {
  using Bits = HeadShare<N, kLanes, kRuns>;
  float a[kRuns][N], b[kRuns][N];

  __device__ void Load(const Bits& bits) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      for (int j = 0; j < N; ++j) {
        a[r][j] = ToFloat(bits.a[r].v[j]);
        b[r][j] = ToFloat(bits.b[r].v[j]);
      }
    }
  }
  __device__ Bits Round() const {
    Bits bits;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      for (int j = 0; j < N; ++j) {
        bits.a[r].v[j] = FromFloat<bf16>(a[r][j]);
        bits.b[r].v[j] = FromFloat<bf16>(b[r][j]);
      }
    }
    return bits;
  }
  __device__ void TurnBack(const Angles<N, kLanes, kRuns>& angles) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      for (int j = 0; j < N; ++j) {
        const float x = a[r][j], cosine = angles.cosine[r].v[j], sine = angles.sine[r].v[j];
        a[r][j] = x * cosine + b[r][j] * sine;
        b[r][j] = b[r][j] * cosine - x * sine;
      }
    }
  }
  // Through the norm of `x`; adds to the norm's own gradient.
  __device__ void ThroughNorm(const Bits& x, const Bits& weight, float eps, int dim,
                              HeadGradient& d_weight) {
    float squares = 0, dot = 0;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      for (int j = 0; j < N; ++j) {
        const float xa = ToFloat(x.a[r].v[j]), xb = ToFloat(x.b[r].v[j]);
        squares += xa * xa + xb * xb;
        dot += a[r][j] * ToFloat(weight.a[r].v[j]) * xa + b[r][j] * ToFloat(weight.b[r].v[j]) * xb;
      }
    }
    const float inv_dim = 1.0f / static_cast<float>(dim);
    const float rstd = 1.0f / sqrtf(GroupSum<kLanes>(squares) * inv_dim + eps);
    const float mean = GroupSum<kLanes>(dot) * rstd * rstd * inv_dim;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      for (int j = 0; j < N; ++j) {
        const float xa = ToFloat(x.a[r].v[j]), xb = ToFloat(x.b[r].v[j]);
        d_weight.a[r][j] += a[r][j] * xa * rstd;
        d_weight.b[r][j] += b[r][j] * xb * rstd;
        a[r][j] = rstd * (a[r][j] * ToFloat(weight.a[r].v[j]) - xa * mean);
        b[r][j] = rstd * (b[r][j] * ToFloat(weight.b[r].v[j]) - xb * mean);
      }
    }
  }
};

// Block: a run of rows. Groups of kLanes threads take up to kHeads heads of a row in turn, so that
// positions and angles are read once for these; all groups of a warp stay in step, those behind the
// end with zeros.
template <int N, int kLanes, int kRuns>
__global__ void __launch_bounds__(kThreads, 3)
    RopeBackwardKernel(RopeBackwardSide s, float eps, TensorView rope, const int32_t* positions,
                       float* partials) {
  using Bits = HeadShare<N, kLanes, kRuns>;
  constexpr unsigned kGroups = kThreads / kLanes, kHeads = 8;
  extern __shared__ float sums[];  // [kGroups, head_dim], with a norm
  const int lane = threadIdx.x % kLanes;
  const unsigned group = threadIdx.x / kLanes, heads = static_cast<unsigned>(s.d_out.shape[1]);
  const int dim = static_cast<int>(s.d_out.shape[2]), half = dim / 2;
  const int64_t rows = s.d_out.shape[0], begin = rows * blockIdx.x / gridDim.x;
  const unsigned slices = (heads + kHeads - 1) / kHeads;  // of a row
  const unsigned items =
      static_cast<unsigned>(rows * (blockIdx.x + 1) / gridDim.x - begin) * slices;
  const bool norm = s.norm.rank != 0;
  Bits weight = {};
  if (norm) weight.Read(static_cast<const bf16*>(s.norm.data), half, lane);
  HeadGradient<N, kLanes, kRuns> d_weight = {};

  for (unsigned base = 0; base < items; base += kGroups) {
    const unsigned item = base + group;
    const bool mine = item < items;
    const int64_t row = begin + (mine ? item / slices : 0);
    const unsigned first = mine ? item % slices * kHeads : heads;
    Angles<N, kLanes, kRuns> angles;
    angles.Read(RowOf<float>(rope, positions[row]), half, lane);
    Bits d = {}, x = {};
    const auto read = [&](unsigned head) {
      d = x = {};
      if (head >= heads) return;
      d.Read(HeadOf(s.d_out, row, head), half, lane);
      if (norm) x.Read(HeadOf(s.in, row, head), half, lane);
    };
    read(first);
    for (unsigned i = 0; i < kHeads; ++i) {
      const unsigned head = first + i;
      const Bits x_now = x;
      HeadGradient<N, kLanes, kRuns> g;
      g.Load(d);
      read(i + 1 < kHeads ? head + 1 : heads);
      g.TurnBack(angles);
      if (norm) g.ThroughNorm(x_now, weight, eps, dim, d_weight);
      if (head < heads) g.Round().Write(HeadOf(s.d_in, row, head), half, lane);
    }
  }
  if (!norm) return;
  for (int r = 0; r < kRuns; ++r) {
    const int c = Bits::Column(r, lane);
    if (c >= half) continue;
    for (int j = 0; j < N; ++j) {
      sums[group * dim + c + j] = d_weight.a[r][j];
      sums[group * dim + half + c + j] = d_weight.b[r][j];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < dim; c += kThreads) {
    float sum = 0;
    for (unsigned g = 0; g < kGroups; ++g) sum += sums[g * dim + c];
    partials[blockIdx.x * int64_t{dim} + c] = sum;
  }
}

// Four columns move as one 8-byte word where heads and strides allow.
bool Aligned8(const TensorView& t) {
  if (t.rank == 0) return true;
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % 8 == 0;
  for (int i = 0; i + 1 < t.rank; ++i) aligned = aligned && t.stride[i] % 4 == 0;
  return aligned;
}

}  // namespace

cudaError_t LaunchRopeBackward(const RopeBackwardSide& side, float eps, const TensorView& rope,
                               const int32_t* positions, float* partials, cudaStream_t stream) {
  const int64_t rows = side.d_out.shape[0], dim = side.d_out.shape[2];
  if (rows == 0) return cudaSuccess;
  const bool wide = Aligned16(rope) && Aligned8(side.d_out) && Aligned8(side.in) &&
                    Aligned8(side.norm) && Aligned8(side.d_in);
  int lanes = 32;
  auto kernel = RopeBackwardKernel<1, 32, 4>;
  if (wide && (dim == 64 || dim == 128 || dim == 256)) {
    lanes = static_cast<int>(dim) / 8;
    kernel = dim == 64    ? RopeBackwardKernel<4, 8, 1>
             : dim == 128 ? RopeBackwardKernel<4, 16, 1>
                          : RopeBackwardKernel<4, 32, 1>;
  }
  const bool norm = side.norm.rank != 0;
  const int64_t parts = rows < kBlocks ? rows : kBlocks;
  const int64_t shared = norm ? kThreads / lanes * dim * static_cast<int64_t>(sizeof(float)) : 0;
  kernel<<<static_cast<unsigned>(parts), kThreads, shared, stream>>>(side, eps, rope, positions,
                                                                     partials);
  return norm ? LaunchAddPartials(partials, parts, dim, side.d_norm, stream) : cudaGetLastError();
}

}  // namespace coppice::cuda
