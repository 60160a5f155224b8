// SwiGLU, forward and backward. One thread per 8 columns of a row; 6 bytes per output element
// forward, 10 backward (12 with the forward's output); bound by memory bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/swiglu.cuh"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 256;

template <typename E, int N>
__global__ void SwiGluKernel(const E* gate_up, int64_t in_stride, E* out, int64_t out_stride,
                             int64_t ffn) {
  const int64_t i = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * N, row = blockIdx.x;
  if (i >= ffn) return;
  const E* gate = gate_up + row * in_stride + i;
  const Pack<E, N> g = Load<E, N>(gate), u = Load<E, N>(gate + ffn);
  Pack<E, N> y;
  for (int j = 0; j < N; ++j) y.v[j] = FromFloat<E>(GatedUnit(ToFloat(g.v[j]), ToFloat(u.v[j])));
  Store<E, N>(out + row * out_stride + i, y);
}

template <typename E, int N>
__global__ void SwiGluBackwardKernel(ops::SwiGluBackwardParams p) {
  const int64_t i = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * N, row = blockIdx.x;
  const int64_t ffn = p.d_out.shape[1];
  if (i >= ffn) return;
  const E* gate = RowOf<E>(p.gate_up, row) + i;
  const Pack<E, N> g = Load<E, N>(gate), u = Load<E, N>(gate + ffn);
  const Pack<E, N> d = Load<E, N>(RowOf<E>(p.d_out, row) + i);
  Pack<E, N> dg, du, y;
  for (int j = 0; j < N; ++j) {
    const GatedGradient x = GatedUnitBackward(ToFloat(g.v[j]), ToFloat(u.v[j]), ToFloat(d.v[j]));
    dg.v[j] = FromFloat<E>(x.gate);
    du.v[j] = FromFloat<E>(x.up);
    y.v[j] = FromFloat<E>(x.act);
  }
  E* to = RowOf<E>(p.d_gate_up, row) + i;
  Store<E, N>(to, dg);
  Store<E, N>(to + ffn, du);
  if (p.out.rank != 0) Store<E, N>(RowOf<E>(p.out, row) + i, y);
}

dim3 Grid(int64_t rows, int64_t ffn, int vector) {
  return dim3(static_cast<unsigned>(rows),
              static_cast<unsigned>(CeilDiv(ffn, int64_t{kThreads} * vector)));
}

}  // namespace

cudaError_t LaunchSwiGlu(const ops::SwiGluParams& p, cudaStream_t stream) {
  const int64_t rows = p.out.shape[0], ffn = p.out.shape[1];
  if (rows == 0 || ffn == 0) return cudaSuccess;
  const bool wide = Aligned16(p.gate_up) && Aligned16(p.out);  // the second: ffn is a multiple of 8
  ForElement(p.out.dtype, [&](auto element) {
    using E = decltype(element);
    const auto kernel = wide ? SwiGluKernel<E, 8> : SwiGluKernel<E, 1>;
    kernel<<<Grid(rows, ffn, wide ? 8 : 1), kThreads, 0, stream>>>(
        p.gate_up.as<E>(), p.gate_up.stride[0], p.out.as<E>(), p.out.stride[0], ffn);
  });
  return cudaGetLastError();
}

cudaError_t LaunchSwiGluBackward(const ops::SwiGluBackwardParams& p, cudaStream_t stream) {
  const int64_t rows = p.d_out.shape[0], ffn = p.d_out.shape[1];
  if (rows == 0 || ffn == 0) return cudaSuccess;
  const bool wide =
      Aligned16(p.gate_up) && Aligned16(p.d_out) && Aligned16(p.d_gate_up) && Aligned16(p.out);
  const auto kernel = ForElement(p.d_out.dtype, [&](auto element) {
    using E = decltype(element);
    return wide ? SwiGluBackwardKernel<E, 8> : SwiGluBackwardKernel<E, 1>;
  });
  kernel<<<Grid(rows, ffn, wide ? 8 : 1), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace coppice::cuda
