// Backward of rotary positions and the per-head RMSNorm before them (rope.cu): the gradient is
// turned back, (a, b) -> (a cos + b sin, b cos - a sin), then goes through the norm
// (norm_backward.cu has the formula). A group of lanes takes a head of a row at a time, with the
// next one on its way, and keeps its share of the norm's gradient in registers. 6 bytes per
// element; bound by memory bandwidth.
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/rope.cuh"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlocks = 264;  // two for each multiprocessor of an H200

// Back through the norm of `x`; adds to the norm's own gradient.
template <typename E, int N, int kLanes, int kRuns>
__device__ inline void ThroughNorm(HeadValues<E, N, kLanes, kRuns>& g,
                                   const HeadShare<E, N, kLanes, kRuns>& x,
                                   const HeadShare<E, N, kLanes, kRuns>& weight, float eps,
                                   float inv_dim, HeadValues<E, N, kLanes, kRuns>& d_weight) {
  float squares = 0, dot = 0;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float xa = x.a[r][j], xb = x.b[r][j];
      squares += xa * xa + xb * xb;
      dot += g.a[r][j] * weight.a[r][j] * xa + g.b[r][j] * weight.b[r][j] * xb;
    }
  }
  squares = GroupSum<kLanes>(squares), dot = GroupSum<kLanes>(dot);
  const float rstd = rsqrtf(squares * inv_dim + eps), mean = dot * rstd * rstd * inv_dim;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float xa = x.a[r][j], xb = x.b[r][j];
      d_weight.a[r][j] += g.a[r][j] * xa * rstd;
      d_weight.b[r][j] += g.b[r][j] * xb * rstd;
      g.a[r][j] = rstd * (g.a[r][j] * weight.a[r][j] - xa * mean);
      g.b[r][j] = rstd * (g.b[r][j] * weight.b[r][j] - xb * mean);
    }
  }
}

// Block: a run of rows. A group of kLanes threads takes up to kHeads heads of a row, one after the
// other, so that its position and angles are read once for these.
template <typename E, int N, int kLanes, int kRuns>
__global__ void __launch_bounds__(kThreads, 2)
    RopeBackwardKernel(RopeBackwardSide s, float eps, TensorView rope, const int32_t* positions,
                       float* partials) {
  using Bits = HeadShare<E, N, kLanes, kRuns>;
  using Values = HeadValues<E, N, kLanes, kRuns>;
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
  const float inv_dim = 1.0f / static_cast<float>(dim);
  Bits weight = {};
  if (norm) weight.Read(static_cast<const E*>(s.norm.data), half, lane);
  Values d_weight = {};

  for (unsigned item = group; item < items; item += kGroups) {
    const int64_t row = begin + item / slices;
    const unsigned first = item % slices * kHeads, last = min(first + kHeads, heads);
    Angles<N, kLanes, kRuns> angles;
    angles.Read(RowOf<float>(rope, positions[row]), half, lane);
    const E* d_out = HeadOf<E>(s.d_out, row, first);
    const E* in = norm ? HeadOf<E>(s.in, row, first) : nullptr;
    E* d_in = HeadOf<E>(s.d_in, row, first);
    Bits d, x = {};
    d.Read(d_out, half, lane);
    if (norm) x.Read(in, half, lane);
    for (unsigned head = first; head < last; ++head) {
      const Bits x_now = x;
      Values g;
      g.Set(d);
      if (head + 1 < last) {
        d_out += s.d_out.stride[1];
        d.Read(d_out, half, lane);
        if (norm) x.Read(in += s.in.stride[1], half, lane);
      }
      g.template Rotate<-1>(angles);
      if (norm) ThroughNorm(g, x_now, weight, eps, inv_dim, d_weight);
      g.Write(d_in, half, lane);
      d_in += s.d_in.stride[1];
    }
  }
  if (!norm) return;
  for (int r = 0; r < kRuns; ++r) {
    const int c = LaneColumns<N, kLanes>::At(r, lane);
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

template <typename E>
auto KernelFor(int64_t dim) {  // 0: any, an element at a time
  return dim == 64    ? RopeBackwardKernel<E, 8, 4, 1>
         : dim == 128 ? RopeBackwardKernel<E, 8, 8, 1>
         : dim == 256 ? RopeBackwardKernel<E, 8, 16, 1>
                      : RopeBackwardKernel<E, 1, 32, 4>;
}

}  // namespace

cudaError_t LaunchRopeBackward(const RopeBackwardSide& side, float eps, const TensorView& rope,
                               const int32_t* positions, float* partials, cudaStream_t stream) {
  const int64_t rows = side.d_out.shape[0], dim = side.d_out.shape[2];
  if (rows == 0) return cudaSuccess;
  const bool wide = Aligned16(rope) && WideHeads(side.d_out) && WideHeads(side.in) &&
                    WideHeads(side.norm) && WideHeads(side.d_in);
  const bool by_lanes = wide && (dim == 64 || dim == 128 || dim == 256);
  const int64_t lanes = by_lanes ? dim / 16 : 32;
  const auto kernel = ForElement(side.d_out.dtype, [&](auto element) {
    return KernelFor<decltype(element)>(by_lanes ? dim : 0);
  });
  const bool norm = side.norm.rank != 0;
  const int64_t parts = rows < kBlocks ? rows : kBlocks;
  const int64_t shared = norm ? kThreads / lanes * dim * static_cast<int64_t>(sizeof(float)) : 0;
  kernel<<<static_cast<unsigned>(parts), kThreads, shared, stream>>>(side, eps, rope, positions,
                                                                     partials);
  return norm ? LaunchAddPartials(partials, parts, dim, side.d_norm, stream) : cudaGetLastError();
}

}  // namespace coppice::cuda
