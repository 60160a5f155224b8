// RMSNorm (Zhang & Sennrich 2019): out = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps). One
// block per row, which it reads once; 6 bytes per element (4 with x in 16 bits); bound by memory
// bandwidth. Backward: norm_backward.cu.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/overlap.cuh"

namespace coppice::cuda {
namespace {

template <typename E>
struct NormArgs {
  const void* x = nullptr;
  int64_t x_stride = 0;
  const E* weight = nullptr;
  float eps = 0;
  E* out = nullptr;
  int64_t out_stride = 0;
  float* rstd = nullptr;  // optional
  int64_t hidden = 0;
};

template <typename E>
__device__ inline float Rstd(const NormArgs<E>& args, float squares, float* shared) {
  const float mean = BlockSum(squares, shared) / static_cast<float>(args.hidden);
  const float rstd = 1.0f / sqrtf(mean + args.eps);
  if (args.rstd != nullptr && threadIdx.x == 0) args.rstd[blockIdx.x] = rstd;
  return rstd;
}

// A thread holds kStrips strips of 8 columns, a block's width apart. REQUIRES: hidden <= kStrips *
// 8 * blockDim.x, 16-byte rows.
template <typename E, typename X, int kStrips>
__global__ void RegisterNormKernel(NormArgs<E> args) {
  __shared__ float shared[33];
  LetSuccessorStart();
  WaitForPredecessor();
  const X* x = static_cast<const X*>(args.x) + blockIdx.x * args.x_stride;
  Strip<X, 8> row[kStrips];
  Strip<E, 8> weight[kStrips];
  float squares = 0;
#pragma unroll
  for (int r = 0; r < kStrips; ++r) {
    const int64_t c = (int64_t{r} * blockDim.x + threadIdx.x) * 8;
    if (c >= args.hidden) continue;
    row[r] = Strip<X, 8>::Read(x + c);
    weight[r] = Strip<E, 8>::Read(args.weight + c);
    for (int j = 0; j < 8; ++j) squares += row[r][j] * row[r][j];
  }
  const float rstd = Rstd(args, squares, shared);
#pragma unroll
  for (int r = 0; r < kStrips; ++r) {
    const int64_t c = (int64_t{r} * blockDim.x + threadIdx.x) * 8;
    if (c >= args.hidden) continue;
    Strip<E, 8> y;
    for (int j = 0; j < 8; ++j) y.Set(j, row[r][j] * rstd * weight[r][j]);
    y.Write(args.out + blockIdx.x * args.out_stride + c);
  }
}

// Any width and alignment.
template <typename E, typename X>
__global__ void RmsNormKernel(NormArgs<E> args) {
  __shared__ float shared[33];
  LetSuccessorStart();
  WaitForPredecessor();
  const X* x = static_cast<const X*>(args.x) + blockIdx.x * args.x_stride;
  E* out = args.out + blockIdx.x * args.out_stride;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < args.hidden; i += blockDim.x) {
    squares += ToFloat(x[i]) * ToFloat(x[i]);
  }
  const float rstd = Rstd(args, squares, shared);
  for (int64_t i = threadIdx.x; i < args.hidden; i += blockDim.x) {
    out[i] = FromFloat<E>(ToFloat(x[i]) * rstd * ToFloat(args.weight[i]));
  }
}

template <typename E, typename X>
cudaError_t Launch(const NormArgs<E>& args, unsigned rows, bool wide, cudaStream_t stream) {
  const OverlappedGrid grid = {dim3(rows), RowThreads(wide ? args.hidden / 8 : args.hidden)};
  const int64_t columns = int64_t{8} * grid.threads;
  if (wide && args.hidden <= columns) {
    return LaunchOverlapped<RegisterNormKernel<E, X, 1>>(grid, stream, args);
  }
  if (wide && args.hidden <= 2 * columns) {
    return LaunchOverlapped<RegisterNormKernel<E, X, 2>>(grid, stream, args);
  }
  return LaunchOverlapped<RmsNormKernel<E, X>>(grid, stream, args);
}

}  // namespace

cudaError_t LaunchRmsNorm(const ops::RmsNormParams& p, cudaStream_t stream) {
  const int64_t rows = p.x.shape[0], hidden = p.x.shape[1];
  if (rows == 0 || hidden == 0) return cudaSuccess;
  const bool wide = Aligned16(p.x) && Aligned16(p.weight) && Aligned16(p.out);
  return ForElement(p.out.dtype, [&](auto element) {
    using E = decltype(element);
    const NormArgs<E> args = {p.x.data,
                              p.x.stride[0],
                              p.weight.as<E>(),
                              p.eps,
                              p.out.as<E>(),
                              p.out.stride[0],
                              p.rstd.present() ? p.rstd.f32() : nullptr,
                              hidden};
    const auto launch = p.x.dtype == DType::kF32 ? Launch<E, float> : Launch<E, E>;
    return launch(args, static_cast<unsigned>(rows), wide, stream);
  });
}

}  // namespace coppice::cuda
