// Sums over rows in two stages of fixed order: blocks add their share of the rows into partial
// sums, then the partial sums of a column are added. SumRows reads each element of x once; bound by
// memory bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

// Block: 32 columns; thread (x, y) adds partials y, y + 32, ... of column x, then the 32 sums of a
// column are added in order.
__global__ void AddPartialsKernel(const float* partials, int64_t num_partials, int64_t n,
                                  float* out) {
  __shared__ float sums[32][33];
  const int64_t column = int64_t{blockIdx.x} * 32 + threadIdx.x;
  float sum = 0;
  if (column < n) {
    for (int64_t i = threadIdx.y; i < num_partials; i += 32) sum += partials[i * n + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= n) return;
  for (int i = 1; i < 32; ++i) sum += sums[i][threadIdx.x];
  out[column] += sum;
}

// Block (x, y): 256 columns, the y-th share of the rows.
template <typename E>
__global__ void SumRowsKernel(const E* x, int64_t stride, int64_t rows, int64_t n,
                              float* partials) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= n) return;
  const int64_t begin = rows * blockIdx.y / gridDim.y, end = rows * (blockIdx.y + 1) / gridDim.y;
  float sum = 0;
  for (int64_t row = begin; row < end; ++row) sum += ToFloat(x[row * stride + column]);
  partials[blockIdx.y * n + column] = sum;
}

}  // namespace

cudaError_t LaunchAddPartials(const float* partials, int64_t num_partials, int64_t n, float* out,
                              cudaStream_t stream) {
  if (num_partials == 0 || n == 0) return cudaSuccess;
  AddPartialsKernel<<<static_cast<unsigned>(CeilDiv(n, 32)), dim3(32, 32), 0, stream>>>(
      partials, num_partials, n, out);
  return cudaGetLastError();
}

cudaError_t LaunchSumRows(const ops::SumRowsParams& p, float* partials, cudaStream_t stream) {
  const int64_t rows = p.x.shape[0], n = p.x.shape[1], parts = NumPartials(rows);
  if (rows == 0 || n == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(CeilDiv(n, 256)), static_cast<unsigned>(parts));
  ForElement(p.x.dtype, [&](auto element) {
    using E = decltype(element);
    SumRowsKernel<<<grid, 256, 0, stream>>>(p.x.as<E>(), p.x.stride[0], rows, n, partials);
  });
  return LaunchAddPartials(partials, parts, n, p.out.f32(), stream);
}

}  // namespace coppice::cuda
