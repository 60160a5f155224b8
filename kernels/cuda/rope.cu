// Per-head RMSNorm of q and k (norm.cu has the formula), rotary positions in the rotate-half form,
// keys and values into their pages. For the halves a, b of a head: (a, b) -> (a cos - b sin, b cos
// + a sin). A group of lanes per head of a row; each element once in, once out (keys and values
// twice); bound by memory bandwidth. Backward: rope_backward.cu.
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/rope.cuh"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 128;

struct ForwardArgs {
  TensorView q_in, k_in, v, q_norm, k_norm, rope, q_out, k_out, page_k, page_v;
  const int32_t* positions;
  const int32_t* kv_slots;  // null: nothing is stored
  float eps;
};

template <typename E, int N, int kLanes, int kRuns>
__global__ void __launch_bounds__(kThreads) QkNormRopeKernel(ForwardArgs p) {
  LetSuccessorStart();
  const int lane = threadIdx.x % kLanes;
  const int dim = static_cast<int>(p.q_in.shape[2]), half = dim / 2;
  const int q_heads = static_cast<int>(p.q_in.shape[1]);
  const int kv_heads = static_cast<int>(p.k_in.shape[1]);
  const int64_t row = blockIdx.x;
  const int item = blockIdx.y * (kThreads / kLanes) + threadIdx.x / kLanes;
  const bool is_q = item < q_heads, is_v = item >= q_heads + kv_heads;
  const int head = is_q ? item : item - q_heads - (is_v ? kv_heads : 0);
  const TensorView& norm = is_q ? p.q_norm : p.k_norm;
  const int64_t slot = is_q || p.kv_slots == nullptr ? -1 : p.kv_slots[row];
  const int64_t page_at = (slot * kv_heads + head) * dim;
  HeadShare<E, N, kLanes, kRuns> bits, weight;
  Angles<N, kLanes, kRuns> angles;
  if (!is_v) {
    angles.Read(RowOf<float>(p.rope, p.positions[row]), half, lane);
    if (norm.rank != 0) weight.Read(static_cast<const E*>(norm.data), half, lane);
  }
  WaitForPredecessor();  // what is above was there before the chain

  HeadValues<E, N, kLanes, kRuns> x;
  if (is_v) {  // stored only
    if (slot < 0 || head >= kv_heads) return;
    bits.Read(HeadOf<E>(p.v, row, head), half, lane);
    x.Set(bits);
    x.Write(static_cast<E*>(p.page_v.data) + page_at, half, lane);
    return;
  }
  bits.Read(HeadOf<E>(is_q ? p.q_in : p.k_in, row, head), half, lane);
  x.Set(bits);
  if (norm.rank != 0) {
    const float rstd = rsqrtf(x.SumSquares() / static_cast<float>(dim) + p.eps);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x.a[r][j] *= rstd * weight.a[r][j];
        x.b[r][j] *= rstd * weight.b[r][j];
      }
    }
  }
  x.template Rotate<1>(angles);
  x.Write(HeadOf<E>(is_q ? p.q_out : p.k_out, row, head), half, lane);
  if (slot >= 0) x.Write(static_cast<E*>(p.page_k.data) + page_at, half, lane);
}

template <typename E, int N, int kLanes, int kRuns>
cudaError_t LaunchOf(const ForwardArgs& args, int64_t heads, cudaStream_t stream) {
  const OverlappedGrid grid = {dim3(static_cast<unsigned>(args.q_in.shape[0]),
                                    static_cast<unsigned>(CeilDiv(heads * kLanes, kThreads))),
                               kThreads};
  return LaunchOverlapped<QkNormRopeKernel<E, N, kLanes, kRuns>>(grid, stream, args);
}

// `dim`: of a head whose halves are walked by 16 bytes, else 0.
template <typename E>
cudaError_t Launch(const ForwardArgs& args, int64_t dim, int64_t heads, cudaStream_t stream) {
  if (dim == 64) return LaunchOf<E, 8, 4, 1>(args, heads, stream);
  if (dim == 128) return LaunchOf<E, 8, 8, 1>(args, heads, stream);
  if (dim == 256) return LaunchOf<E, 8, 16, 1>(args, heads, stream);
  return LaunchOf<E, 1, 32, 4>(args, heads, stream);
}

}  // namespace

cudaError_t LaunchQkNormRope(const ops::QkNormRopeParams& p, const int32_t* positions,
                             const int32_t* kv_slots, cudaStream_t stream) {
  if (p.q_in.shape[0] == 0) return cudaSuccess;
  const ForwardArgs args = {p.q_in,  p.k_in,    p.v,       p.q_norm,  p.k_norm, p.rope, p.q_out,
                            p.k_out, p.pages.k, p.pages.v, positions, kv_slots, p.eps};
  const int64_t heads = p.q_in.shape[1] + (kv_slots == nullptr ? 1 : 2) * p.k_in.shape[1];
  bool wide = Aligned16(p.rope);
  for (const TensorView* t :
       {&p.q_in, &p.k_in, &p.v, &p.q_norm, &p.k_norm, &p.q_out, &p.k_out, &p.pages.k, &p.pages.v}) {
    wide = wide && WideHeads(*t);
  }
  const int64_t dim = wide ? p.q_in.shape[2] : 0;
  return ForElement(p.q_in.dtype, [&](auto element) {
    return Launch<decltype(element)>(args, dim, heads, stream);
  });
}

}  // namespace coppice::cuda
