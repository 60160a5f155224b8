// Backward of RMSNorm (norm.cu). With g = d_out * weight and xhat = x * rstd:
//   d_x = rstd * (g - xhat * mean(g * xhat)),  d_weight = sum over rows of d_out * xhat,
// and, if asked for, out = xhat * weight, as norm.cu rounds it.
// A block takes a run of rows; a thread keeps its columns' share of d_weight in registers while the
// next row is on its way. 8 bytes per element, 2 more with accumulation, 2 with out; bound by
// memory bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int kMaxThreads = 512;
constexpr int64_t kMultiprocessors = 132;  // of an H200

// Sum over the block, for every thread, one barrier. REQUIRES: calls alternate between the two
// halves of `sums` [2][kMaxThreads / 32].
__device__ inline float RowSum(float x, float (*sums)[kMaxThreads / 32], int half) {
  x = WarpSum(x);
  if (threadIdx.x % 32 == 0) sums[half][threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += sums[half][w];
  return sum;
}

// Until here x may not be turned into floats, which take twice the registers: with more than 64 of
// them fewer blocks fit a multiprocessor.
template <typename E>
__device__ __forceinline__ void Hold(Strip<E, 8>& x) {
  uint32_t(&words)[4] = reinterpret_cast<uint32_t(&)[4]>(x);
  asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
}

// A thread's columns of one row: runs of 8, a block's width apart.
template <typename E, int kRuns>
struct RowShare {
  Strip<float, 8> x[kRuns];
  Strip<E, 8> d_out[kRuns], d_x[kRuns];
  float rstd;

  __device__ void Read(const ops::RmsNormBackwardParams& p, int row, int hidden) {
    rstd = *RowOf<float>(p.rstd, row);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int c = static_cast<int>(r * blockDim.x + threadIdx.x) * 8;
      x[r] = {};
      d_out[r] = d_x[r] = {};
      if (c >= hidden) continue;
      x[r] = Strip<float, 8>::Read(RowOf<float>(p.x, row) + c);
      d_out[r] = Strip<E, 8>::Read(RowOf<E>(p.d_out, row) + c);
      if (p.accumulate_d_x) d_x[r] = Strip<E, 8>::Read(RowOf<E>(p.d_x, row) + c);
    }
  }
};

// REQUIRES: hidden <= kRuns * 8 * blockDim.x, 16-byte rows.
template <typename E, int kRuns>
__global__ void __launch_bounds__(kMaxThreads, kRuns == 1 ? 2 : 1)
    RegisterNormBackwardKernel(ops::RmsNormBackwardParams p, float* partials) {
  __shared__ float sums[2][kMaxThreads / 32];
  const int hidden = static_cast<int>(p.x.shape[1]);
  const int end = static_cast<int>(p.x.shape[0] * (blockIdx.x + 1) / gridDim.x);
  Strip<E, 8> weight[kRuns];
  float d_weight[kRuns][8] = {};
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int c = static_cast<int>(r * blockDim.x + threadIdx.x) * 8;
    weight[r] = {};
    if (c < hidden) weight[r] = Strip<E, 8>::Read(RowOf<E>(p.weight, 0) + c);
  }
  int row = static_cast<int>(p.x.shape[0] * blockIdx.x / gridDim.x);
  RowShare<E, kRuns> share;
  if (row < end) share.Read(p, row, hidden);
  for (int half = 0; row < end; ++row, half ^= 1) {
    const RowShare<E, kRuns> now = share;
    if (row + 1 < end) share.Read(p, row + 1, hidden);
    float dot = 0;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      Hold(weight[r]);
      for (int j = 0; j < 8; ++j) {
        const float dx = now.d_out[r][j] * now.x[r][j];
        dot += dx * weight[r][j];
        d_weight[r][j] += dx * now.rstd;
      }
    }
    const float mean = RowSum(dot, sums, half) * now.rstd * now.rstd / static_cast<float>(hidden);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int c = static_cast<int>(r * blockDim.x + threadIdx.x) * 8;
      if (c >= hidden) continue;
      Strip<E, 8> y;
      Hold(weight[r]);
      for (int j = 0; j < 8; ++j) {
        const float g = now.d_out[r][j] * weight[r][j];
        y.Set(j, now.d_x[r][j] + now.rstd * (g - now.x[r][j] * mean));
      }
      y.Write(RowOf<E>(p.d_x, row) + c);
      if (p.out.data == nullptr) continue;
      for (int j = 0; j < 8; ++j) y.Set(j, now.x[r][j] * now.rstd * weight[r][j]);
      y.Write(RowOf<E>(p.out, row) + c);
    }
  }
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int c = static_cast<int>(r * blockDim.x + threadIdx.x) * 8;
    if (c >= hidden) continue;
    for (int j = 0; j < 8; ++j) partials[int64_t{blockIdx.x} * hidden + c + j] = d_weight[r][j];
  }
}

// Any width and alignment: d_weight in shared memory, an element at a time.
template <typename E>
__global__ void RmsNormBackwardKernel(ops::RmsNormBackwardParams p, float* partials) {
  extern __shared__ float d_weight[];  // [hidden]; each thread touches its own columns only
  __shared__ float shared[33];
  const int64_t rows = p.x.shape[0], hidden = p.x.shape[1];
  const E* weight = RowOf<E>(p.weight, 0);
  for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) d_weight[i] = 0;
  const int64_t end = rows * (blockIdx.x + 1) / gridDim.x;
  for (int64_t row = rows * blockIdx.x / gridDim.x; row < end; ++row) {
    const float* x = RowOf<float>(p.x, row);
    const E* d_out = RowOf<E>(p.d_out, row);
    E* d_x = RowOf<E>(p.d_x, row);
    const float rstd = *RowOf<float>(p.rstd, row);
    float dot = 0;
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      const float dx = ToFloat(d_out[i]) * x[i];
      dot += dx * ToFloat(weight[i]);
      d_weight[i] += dx * rstd;
    }
    const float mean = BlockSum(dot, shared) * rstd * rstd / static_cast<float>(hidden);
    for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
      const float before = p.accumulate_d_x ? ToFloat(d_x[i]) : 0.0f;
      const float g = ToFloat(d_out[i]) * ToFloat(weight[i]);
      d_x[i] = FromFloat<E>(before + rstd * (g - x[i] * mean));
      if (p.out.data != nullptr) {
        RowOf<E>(p.out, row)[i] = FromFloat<E>(x[i] * rstd * ToFloat(weight[i]));
      }
    }
  }
  for (int64_t i = threadIdx.x; i < hidden; i += blockDim.x) {
    partials[blockIdx.x * hidden + i] = d_weight[i];
  }
}

// Returns the partial sums.
template <typename E>
int64_t Launch(const ops::RmsNormBackwardParams& p, bool wide, float* partials,
               cudaStream_t stream) {
  const int64_t rows = p.x.shape[0], hidden = p.x.shape[1];
  int64_t parts = NumPartials(rows);
  if (wide && hidden <= 2 * 8 * kMaxThreads) {
    const int threads = RowThreads(hidden / 8);
    const bool one_run = threads * 8 >= hidden;
    const auto kernel =
        one_run ? RegisterNormBackwardKernel<E, 1> : RegisterNormBackwardKernel<E, 2>;
    const int64_t resident = kMultiprocessors * (one_run ? 2 * kMaxThreads / threads : 1);
    if (resident < parts) parts = resident;
    kernel<<<static_cast<unsigned>(parts), threads, 0, stream>>>(p, partials);
  } else {
    RmsNormBackwardKernel<E>
        <<<static_cast<unsigned>(parts), RowThreads(hidden), hidden * sizeof(float), stream>>>(
            p, partials);
  }
  return parts;
}

}  // namespace

cudaError_t LaunchRmsNormBackward(const ops::RmsNormBackwardParams& p, float* partials,
                                  cudaStream_t stream) {
  const int64_t rows = p.x.shape[0], hidden = p.x.shape[1];
  if (rows == 0 || hidden == 0) return cudaSuccess;
  const bool wide = Aligned16(p.x) && Aligned16(p.d_out) && Aligned16(p.weight) &&
                    Aligned16(p.d_x) && (!p.out.present() || Aligned16(p.out));
  const int64_t parts = ForElement(p.d_x.dtype, [&](auto element) {
    return Launch<decltype(element)>(p, wide, partials, stream);
  });
  return LaunchAddPartials(partials, parts, hidden, p.d_weight.f32(), stream);
}

}  // namespace coppice::cuda
