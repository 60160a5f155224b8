// Per-head RMSNorm of q and k (norm.cu has the formula), rotary positions in the rotate-half form,
// keys and values into their pages. For the halves a, b of a head: (a, b) -> (a cos - b sin, b cos
// + a sin). One warp per head of a row; each element once in, once out (keys and values twice);
// bound by memory bandwidth. Backward: rope_backward.cu.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/overlap.cuh"

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
  __device__ void Rotate(const float* cos_sin, int64_t half, int lane) {
#pragma unroll
    for (int i = 0; i < kMaxPairs; ++i) {
      const int64_t c = (int64_t{i / N} * 32 + lane) * N + i % N;
      if (c >= half) continue;
      const float cosine = cos_sin[c], sine = cos_sin[half + c], x = a[i];
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
  LetSuccessorStart();
  WaitForPredecessor();
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
  share.Rotate(RowOf<float>(p.rope, p.positions[row]), half, lane);
  share.Write(HeadOf(is_q ? p.q_out : p.k_out, row, head), half, lane);
  if (!is_q && slot >= 0) {
    share.Write(static_cast<bf16*>(p.page_k.data) + (slot * kv_heads + head) * dim, half, lane);
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
  const OverlappedGrid grid = {
      dim3(static_cast<unsigned>(rows), static_cast<unsigned>(CeilDiv(items, kWarps))),
      kWarps * 32};
  if (paired) return LaunchOverlapped<QkNormRopeKernel<2>>(grid, stream, args);
  return LaunchOverlapped<QkNormRopeKernel<1>>(grid, stream, args);
}

}  // namespace coppice::cuda
