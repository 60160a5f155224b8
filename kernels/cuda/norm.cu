// RMSNorm (Zhang & Sennrich 2019): out = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps). One
// block per row, 4 bytes per element; bound by memory bandwidth. Backward: norm_backward.cu.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {
namespace {

template <int N>
__global__ void RmsNormKernel(const bf16* x, int64_t x_stride, const bf16* weight, float eps,
                              bf16* out, int64_t out_stride, float* rstd_out, int64_t hidden) {
  __shared__ float shared[33];
  LetSuccessorStart();
  WaitForPredecessor();
  x += blockIdx.x * x_stride;
  out += blockIdx.x * out_stride;
  float squares = 0;
  for (int64_t i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
    const Pack<bf16, N> v = Load<bf16, N>(x + i);
    for (int j = 0; j < N; ++j) squares += ToFloat(v.v[j]) * ToFloat(v.v[j]);
  }
  const float rstd = 1.0f / sqrtf(BlockSum(squares, shared) / static_cast<float>(hidden) + eps);
  for (int64_t i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
    const Pack<bf16, N> v = Load<bf16, N>(x + i), w = Load<bf16, N>(weight + i);
    Pack<bf16, N> y;
    for (int j = 0; j < N; ++j) y.v[j] = FromFloat<bf16>(ToFloat(v.v[j]) * rstd * ToFloat(w.v[j]));
    Store<bf16, N>(out + i, y);
  }
  if (rstd_out != nullptr && threadIdx.x == 0) rstd_out[blockIdx.x] = rstd;
}

}  // namespace

cudaError_t LaunchRmsNorm(const ops::RmsNormParams& p, cudaStream_t stream) {
  const int64_t rows = p.x.shape[0], hidden = p.x.shape[1];
  if (rows == 0 || hidden == 0) return cudaSuccess;
  const bool wide = Aligned16(p.x) && Aligned16(p.weight) && Aligned16(p.out);
  const OverlappedGrid grid = {dim3(static_cast<unsigned>(rows)),
                               RowThreads(wide ? hidden / 8 : hidden)};
  float* rstd = p.rstd.present() ? p.rstd.f32() : nullptr;
  if (wide) {
    return LaunchOverlapped<RmsNormKernel<8>>(grid, stream, p.x.as<bf16>(), p.x.stride[0],
                                              p.weight.as<bf16>(), p.eps, p.out.as<bf16>(),
                                              p.out.stride[0], rstd, hidden);
  }
  return LaunchOverlapped<RmsNormKernel<1>>(grid, stream, p.x.as<bf16>(), p.x.stride[0],
                                            p.weight.as<bf16>(), p.eps, p.out.as<bf16>(),
                                            p.out.stride[0], rstd, hidden);
}

}  // namespace coppice::cuda
