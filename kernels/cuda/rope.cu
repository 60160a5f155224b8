// Per-head RMSNorm of q and k (norm.cu has the formula), rotary positions in the rotate-half form,
// keys and values into their pages. For the halves a, b of a head: (a, b) -> (a cos - b sin, b cos
// + a sin); backward turns the other way, then goes through the norm. One warp per head of a row;
// each element once in, once out (keys and values twice); bound by memory bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxPairs =
    4;  // of N columns and their counterparts, per lane: head_dim <= 256 (N = 1)

// A lane's share of a head: columns [lane * N, lane * N + N) of each run of 32 N, in both halves.
template <int N>
struct Share {
  float a[kMaxPairs / N * N], b[kMaxPairs / N * N];

  __device__ void Read(const bf16* x, int64_t half, int lane) {
#pragma unroll
    for (int i = 0; i < kMaxPairs / N; ++i) {
      const int64_t c = (int64_t{i} * 32 + lane) * N;
      Pack<bf16, N> lo = {}, hi = {};
      if (c < half) {
        lo = Load<bf16, N>(x + c);
        hi = Load<bf16, N>(x + half + c);
      }
#pragma unroll
      for (int j = 0; j < N; ++j) {
        a[i * N + j] = c < half ? ToFloat(lo.v[j]) : 0.0f;
        b[i * N + j] = c < half ? ToFloat(hi.v[j]) : 0.0f;
      }
    }
  }
  __device__ void Write(bf16* y, int64_t half, int lane) const {
#pragma unroll
    for (int i = 0; i < kMaxPairs / N; ++i) {
      const int64_t c = (int64_t{i} * 32 + lane) * N;
      if (c >= half) continue;
      Pack<bf16, N> lo, hi;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        lo.v[j] = FromFloat<bf16>(a[i * N + j]);
        hi.v[j] = FromFloat<bf16>(b[i * N + j]);
      }
      Store<bf16, N>(y + c, lo);
      Store<bf16, N>(y + half + c, hi);
    }
  }
  __device__ void Rotate(const float* cos_sin, float direction, int64_t half, int lane) {
#pragma unroll
    for (int i = 0; i < kMaxPairs; ++i) {
      const int64_t c = (int64_t{i / N} * 32 + lane) * N + i % N;
      if (c >= half) continue;
      const float cosine = cos_sin[c], sine = direction * cos_sin[half + c], x = a[i];
      a[i] = x * cosine - b[i] * sine;
      b[i] = b[i] * cosine + x * sine;
    }
  }
  __device__ float SumSquares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kMaxPairs; ++i) sum += a[i] * a[i] + b[i] * b[i];
    return WarpSum(sum);
  }
};

struct ForwardArgs {
  TensorView q_in, k_in, v, q_norm, k_norm, rope, q_out, k_out, page_k, page_v;
  const int32_t* positions;
  const int32_t* kv_slots;  // null: nothing is stored
  float eps;
};

__device__ inline bf16* HeadOf(const TensorView& t, int64_t row, int64_t head) {
  return static_cast<bf16*>(t.data) + row * t.stride[0] + head * t.stride[1];
}

template <int N>
__global__ void QkNormRopeKernel(ForwardArgs p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = blockIdx.x, dim = p.q_in.shape[2], half = dim / 2;
  const int64_t q_heads = p.q_in.shape[1], kv_heads = p.k_in.shape[1];
  const int64_t item = int64_t{blockIdx.y} * kWarps + threadIdx.x / 32;
  const int32_t slot = p.kv_slots == nullptr ? -1 : p.kv_slots[row];
  Share<N> share;
  if (item >= q_heads + kv_heads) {  // a value head: stored only
    const int64_t head = item - q_heads - kv_heads;
    if (slot < 0 || head >= kv_heads) return;
    share.Read(HeadOf(p.v, row, head), half, lane);
    share.Write(static_cast<bf16*>(p.page_v.data) + (slot * kv_heads + head) * dim, half, lane);
    return;
  }
  const bool is_q = item < q_heads;
  const int64_t head = is_q ? item : item - q_heads;
  const TensorView& norm = is_q ? p.q_norm : p.k_norm;
  share.Read(HeadOf(is_q ? p.q_in : p.k_in, row, head), half, lane);
  if (norm.rank != 0) {
    const float rstd = 1.0f / sqrtf(share.SumSquares() / static_cast<float>(dim) + p.eps);
    Share<N> weight;
    weight.Read(static_cast<const bf16*>(norm.data), half, lane);
#pragma unroll
    for (int i = 0; i < kMaxPairs; ++i) {
      share.a[i] *= rstd * weight.a[i];
      share.b[i] *= rstd * weight.b[i];
    }
  }
  share.Rotate(RowOf<float>(p.rope, p.positions[row]), 1.0f, half, lane);
  share.Write(HeadOf(is_q ? p.q_out : p.k_out, row, head), half, lane);
  if (!is_q && slot >= 0) {
    share.Write(static_cast<bf16*>(p.page_k.data) + (slot * kv_heads + head) * dim, half, lane);
  }
}

// A block takes a run of rows; its warps take the heads in turn and keep their share of d_norm in
// registers.
template <int N>
__global__ void RopeBackwardKernel(RopeBackwardSide s, float eps, TensorView rope,
                                   const int32_t* positions, float* partials) {
  extern __shared__ float sums[];  // [kWarps, head_dim]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t rows = s.d_out.shape[0], heads = s.d_out.shape[1], dim = s.d_out.shape[2],
                half = dim / 2;
  const bool norm = s.norm.rank != 0;
  Share<N> weight, d_weight = {};
  if (norm) weight.Read(static_cast<const bf16*>(s.norm.data), half, lane);
  const int64_t begin = rows * blockIdx.x / gridDim.x, end = rows * (blockIdx.x + 1) / gridDim.x;
  for (int64_t item = begin * heads + warp; item < end * heads; item += kWarps) {
    const int64_t row = item / heads, head = item % heads;
    Share<N> d;
    d.Read(HeadOf(s.d_out, row, head), half, lane);
    d.Rotate(RowOf<float>(rope, positions[row]), -1.0f, half, lane);
    if (norm) {
      Share<N> x;
      x.Read(HeadOf(s.in, row, head), half, lane);
      const float rstd = 1.0f / sqrtf(x.SumSquares() / static_cast<float>(dim) + eps);
      float dot = 0;
#pragma unroll
      for (int i = 0; i < kMaxPairs; ++i) {
        d_weight.a[i] += d.a[i] * x.a[i] * rstd;
        d_weight.b[i] += d.b[i] * x.b[i] * rstd;
        d.a[i] *= weight.a[i];
        d.b[i] *= weight.b[i];
        dot += d.a[i] * x.a[i] + d.b[i] * x.b[i];
      }
      const float mean = WarpSum(dot) * rstd * rstd / static_cast<float>(dim);
#pragma unroll
      for (int i = 0; i < kMaxPairs; ++i) {
        d.a[i] = rstd * (d.a[i] - x.a[i] * mean);
        d.b[i] = rstd * (d.b[i] - x.b[i] * mean);
      }
    }
    d.Write(HeadOf(s.d_in, row, head), half, lane);
  }
  if (!norm) return;
#pragma unroll
  for (int i = 0; i < kMaxPairs; ++i) {
    const int64_t c = (int64_t{i / N} * 32 + lane) * N + i % N;
    if (c >= half) continue;
    sums[warp * dim + c] = d_weight.a[i];
    sums[warp * dim + half + c] = d_weight.b[i];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < dim; c += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums[w * dim + c];
    partials[blockIdx.x * dim + c] = sum;
  }
}

// Pairs of columns move as one 4-byte word where halves and strides allow.
bool Paired(const TensorView& t) {
  if (t.rank == 0) return true;
  bool even = reinterpret_cast<uintptr_t>(t.data) % 4 == 0 && t.shape[t.rank - 1] % 4 == 0;
  for (int i = 0; i + 1 < t.rank; ++i) even = even && t.stride[i] % 2 == 0;
  return even;
}

}  // namespace

cudaError_t LaunchQkNormRope(const ops::QkNormRopeParams& p, const int32_t* positions,
                             const int32_t* kv_slots, cudaStream_t stream) {
  const int64_t rows = p.q_in.shape[0];
  if (rows == 0) return cudaSuccess;
  const ForwardArgs args = {p.q_in,  p.k_in,    p.v,       p.q_norm,  p.k_norm, p.rope, p.q_out,
                            p.k_out, p.pages.k, p.pages.v, positions, kv_slots, p.eps};
  const int64_t items = p.q_in.shape[1] + (kv_slots == nullptr ? 1 : 2) * p.k_in.shape[1];
  bool paired = true;
  for (const TensorView* t :
       {&p.q_in, &p.k_in, &p.v, &p.q_norm, &p.k_norm, &p.q_out, &p.k_out, &p.pages.k, &p.pages.v}) {
    paired = paired && Paired(*t);
  }
  const auto kernel = paired ? QkNormRopeKernel<2> : QkNormRopeKernel<1>;
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(CeilDiv(items, kWarps)));
  kernel<<<grid, kWarps * 32, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t LaunchRopeBackward(const RopeBackwardSide& side, float eps, const TensorView& rope,
                               const int32_t* positions, float* partials, cudaStream_t stream) {
  const int64_t rows = side.d_out.shape[0], dim = side.d_out.shape[2];
  if (rows == 0) return cudaSuccess;
  const bool paired =
      Paired(side.d_out) && Paired(side.in) && Paired(side.norm) && Paired(side.d_in);
  const auto kernel = paired ? RopeBackwardKernel<2> : RopeBackwardKernel<1>;
  const bool norm = side.norm.rank != 0;
  const int64_t parts =
      norm ? NumPartials(rows) : rows;  // without a sum, any cut gives the same bits
  kernel<<<static_cast<unsigned>(parts), kWarps * 32, kWarps * dim * sizeof(float), stream>>>(
      side, eps, rope, positions, partials);
  return norm ? LaunchAddPartials(partials, parts, dim, side.d_norm, stream) : cudaGetLastError();
}

}  // namespace coppice::cuda
