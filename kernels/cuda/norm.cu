// RMSNorm (Zhang & Sennrich 2019): out = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps).
// Backward, g = d_out * weight: d_x = rstd * (g - x * rstd^2 * mean(g x)), d_weight = sum over rows
// of d_out * x * rstd. Forward: one block per row, 4 bytes per element. Backward: a block takes a
// run of rows and keeps its share of d_weight in shared memory, 6 (8 with accumulation) bytes per
// element. Both bound by memory bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

template <int N>
__global__ void RmsNormKernel(const bf16* x, int64_t x_stride, const bf16* weight, float eps,
                              bf16* out, int64_t out_stride, float* rstd_out, int64_t hidden) {
  __shared__ float shared[33];
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

template <int N>
__global__ void RmsNormBackwardKernel(ops::RmsNormBackwardParams p, float* partials) {
  extern __shared__ float d_weight[];  // [hidden]; each thread touches its own columns only
  __shared__ float shared[33];
  const int64_t rows = p.x.shape[0], hidden = p.x.shape[1];
  const bf16* weight = RowOf<bf16>(p.weight, 0);
  for (int64_t i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
    for (int j = 0; j < N; ++j) d_weight[i + j] = 0;
  }
  const int64_t end = rows * (blockIdx.x + 1) / gridDim.x;
  for (int64_t row = rows * blockIdx.x / gridDim.x; row < end; ++row) {
    const bf16* x = RowOf<bf16>(p.x, row);
    const bf16* d_out = RowOf<bf16>(p.d_out, row);
    bf16* d_x = RowOf<bf16>(p.d_x, row);
    const float rstd = *RowOf<float>(p.rstd, row);
    float dot = 0;
    for (int64_t i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
      const Pack<bf16, N> v = Load<bf16, N>(x + i), d = Load<bf16, N>(d_out + i),
                          w = Load<bf16, N>(weight + i);
      for (int j = 0; j < N; ++j) {
        const float dv = ToFloat(d.v[j]), xv = ToFloat(v.v[j]);
        dot += dv * ToFloat(w.v[j]) * xv;
        d_weight[i + j] += dv * xv * rstd;
      }
    }
    const float mean = BlockSum(dot, shared) * rstd * rstd / static_cast<float>(hidden);
    for (int64_t i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
      const Pack<bf16, N> v = Load<bf16, N>(x + i), d = Load<bf16, N>(d_out + i),
                          w = Load<bf16, N>(weight + i);
      Pack<bf16, N> y = {};
      if (p.accumulate_d_x) y = Load<bf16, N>(d_x + i);
      for (int j = 0; j < N; ++j) {
        const float g = ToFloat(d.v[j]) * ToFloat(w.v[j]);
        const float before = p.accumulate_d_x ? ToFloat(y.v[j]) : 0.0f;
        y.v[j] = FromFloat<bf16>(before + rstd * (g - ToFloat(v.v[j]) * mean));
      }
      Store<bf16, N>(d_x + i, y);
    }
  }
  for (int64_t i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
    for (int j = 0; j < N; ++j) partials[blockIdx.x * hidden + i + j] = d_weight[i + j];
  }
}

}  // namespace

cudaError_t LaunchRmsNorm(const ops::RmsNormParams& p, cudaStream_t stream) {
  const int64_t rows = p.x.shape[0], hidden = p.x.shape[1];
  if (rows == 0 || hidden == 0) return cudaSuccess;
  const bool wide = Aligned16(p.x) && Aligned16(p.weight) && Aligned16(p.out);
  const auto kernel = wide ? RmsNormKernel<8> : RmsNormKernel<1>;
  kernel<<<static_cast<unsigned>(rows), RowThreads(wide ? hidden / 8 : hidden), 0, stream>>>(
      p.x.as<bf16>(), p.x.stride[0], p.weight.as<bf16>(), p.eps, p.out.as<bf16>(), p.out.stride[0],
      p.rstd.present() ? p.rstd.f32() : nullptr, hidden);
  return cudaGetLastError();
}

cudaError_t LaunchRmsNormBackward(const ops::RmsNormBackwardParams& p, float* partials,
                                  cudaStream_t stream) {
  const int64_t rows = p.x.shape[0], hidden = p.x.shape[1], parts = NumPartials(rows);
  if (rows == 0 || hidden == 0) return cudaSuccess;
  const bool wide = Aligned16(p.x) && Aligned16(p.d_out) && Aligned16(p.weight) && Aligned16(p.d_x);
  const auto kernel = wide ? RmsNormBackwardKernel<8> : RmsNormBackwardKernel<1>;
  kernel<<<static_cast<unsigned>(parts), RowThreads(wide ? hidden / 8 : hidden),
           hidden * sizeof(float), stream>>>(p, partials);
  return LaunchAddPartials(partials, parts, hidden, p.d_weight.f32(), stream);
}

}  // namespace coppice::cuda
