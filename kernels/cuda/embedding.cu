// Rows of tables: gather (embedding, which widens), its transposes. One block per row; an index
// outside the table gives a row of NaN and is never followed. Bytes: each row once in, once out (+=
// reads it as well); bound by memory bandwidth.
//
// EmbeddingBackward: the block of the first row with an id adds all rows with that id, ascending;
// the blocks of the others leave. Finding them reads ids only: rows^2 * 4 bytes of L2 traffic,
// spread over all blocks.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

template <typename S, typename D, int N>
__global__ void GatherRowsKernel(const S* src, int64_t src_stride, int64_t src_rows,
                                 const int32_t* indices, D* out, int64_t out_stride,
                                 int64_t hidden) {
  const int32_t index = indices[blockIdx.x];
  D* to = out + blockIdx.x * out_stride;
  const bool valid = index >= 0 && index < src_rows;
  const S* from = src + (valid ? index : 0) * src_stride;
  for (int64_t i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
    const Strip<S, N> x = Strip<S, N>::Read(from + i);
    Strip<D, N> y;
    for (int j = 0; j < N; ++j) y.Set(j, valid ? x[j] : __int_as_float(0x7fc00000));
    y.Write(to + i);
  }
}

template <typename S, typename D>
cudaError_t GatherRows(const ops::GatherRowsParams& p, cudaStream_t stream) {
  const int64_t n = p.out.shape[0], hidden = p.out.shape[1];
  const bool wide = Aligned16(p.src) && Aligned16(p.out) && hidden % 8 == 0;
  const auto kernel = wide ? GatherRowsKernel<S, D, 8> : GatherRowsKernel<S, D, 1>;
  kernel<<<static_cast<unsigned>(n), RowThreads(wide ? hidden / 8 : hidden), 0, stream>>>(
      p.src.as<S>(), p.src.stride[0], p.src.shape[0], p.indices.i32(), p.out.as<D>(),
      p.out.stride[0], hidden);
  return cudaGetLastError();
}

template <typename E, int N>
__global__ void ScatterAddRowsKernel(const E* src, int64_t src_stride, const int32_t* indices,
                                     E* dst, int64_t dst_stride, int64_t dst_rows, int64_t hidden) {
  const int32_t index = indices[blockIdx.x];
  if (index < 0 || index >= dst_rows) return;
  const E* from = src + blockIdx.x * src_stride;
  E* to = dst + index * dst_stride;
  for (int64_t i = threadIdx.x * N; i < hidden; i += blockDim.x * N) {
    const Pack<E, N> x = Load<E, N>(from + i);
    Pack<E, N> y = Load<E, N>(to + i);
    for (int j = 0; j < N; ++j) y.v[j] = FromFloat<E>(ToFloat(y.v[j]) + ToFloat(x.v[j]));
    Store<E, N>(to + i, y);
  }
}

constexpr int kScanThreads = 256;

template <typename E>
__global__ void EmbeddingBackwardKernel(const int32_t* ids, int64_t rows, const E* d_out,
                                        int64_t d_out_stride, float* d_table,
                                        int64_t d_table_stride, int64_t vocab, int64_t hidden) {
  extern __shared__ float sums[];  // [hidden]; each thread touches its own columns only
  __shared__ unsigned matches[kScanThreads / 32];
  const int64_t row = blockIdx.x;
  const int32_t id = ids[row];
  bool repeated = false;
  for (int64_t i = threadIdx.x; i < row; i += kScanThreads) repeated |= ids[i] == id;
  if (__syncthreads_or(repeated) || id < 0 || id >= vocab) return;

  float* to = d_table + id * d_table_stride;
  for (int64_t c = threadIdx.x; c < hidden; c += kScanThreads) sums[c] = to[c];
  for (int64_t base = row; base < rows; base += kScanThreads) {
    const int64_t i = base + threadIdx.x;
    const unsigned mine = __ballot_sync(~0u, i < rows && ids[i] == id);
    __syncthreads();
    if (threadIdx.x % 32 == 0) matches[threadIdx.x / 32] = mine;
    __syncthreads();
    for (int w = 0; w < kScanThreads / 32; ++w) {
      for (unsigned bits = matches[w]; bits != 0; bits &= bits - 1) {
        const E* from = d_out + (base + 32 * w + __ffs(bits) - 1) * d_out_stride;
        for (int64_t c = threadIdx.x; c < hidden; c += kScanThreads) sums[c] += ToFloat(from[c]);
      }
    }
  }
  for (int64_t c = threadIdx.x; c < hidden; c += kScanThreads) to[c] = sums[c];
}

}  // namespace

cudaError_t LaunchGatherRows(const ops::GatherRowsParams& p, cudaStream_t stream) {
  if (p.out.num_elements() == 0) return cudaSuccess;
  if (p.src.dtype == DType::kF32) return GatherRows<float, float>(p, stream);
  return ForElement(p.src.dtype, [&](auto element) {
    using E = decltype(element);
    return p.out.dtype == DType::kF32 ? GatherRows<E, float>(p, stream)
                                      : GatherRows<E, E>(p, stream);
  });
}

cudaError_t LaunchScatterAddRows(const ops::ScatterAddRowsParams& p, cudaStream_t stream) {
  const int64_t n = p.src.shape[0], hidden = p.src.shape[1];
  if (n == 0 || hidden == 0) return cudaSuccess;
  const bool wide = Aligned16(p.src) && Aligned16(p.dst);
  ForElement(p.dst.dtype, [&](auto element) {
    using E = decltype(element);
    const auto kernel = wide ? ScatterAddRowsKernel<E, 8> : ScatterAddRowsKernel<E, 1>;
    kernel<<<static_cast<unsigned>(n), RowThreads(wide ? hidden / 8 : hidden), 0, stream>>>(
        p.src.as<E>(), p.src.stride[0], p.indices.i32(), p.dst.as<E>(), p.dst.stride[0],
        p.dst.shape[0], hidden);
  });
  return cudaGetLastError();
}

cudaError_t LaunchEmbeddingBackward(const ops::EmbeddingBackwardParams& p, cudaStream_t stream) {
  const int64_t rows = p.d_out.shape[0], hidden = p.d_out.shape[1];
  if (rows == 0 || hidden == 0) return cudaSuccess;
  ForElement(p.d_out.dtype, [&](auto element) {
    using E = decltype(element);
    EmbeddingBackwardKernel<<<static_cast<unsigned>(rows), kScanThreads, hidden * sizeof(float),
                              stream>>>(p.ids.i32(), rows, p.d_out.as<E>(), p.d_out.stride[0],
                                        p.d_table.f32(), p.d_table.stride[0], p.d_table.shape[0],
                                        hidden);
  });
  return cudaGetLastError();
}

}  // namespace coppice::cuda
