// Copies that the copy engine cannot do: rows with conversion or a repeated source row, and KV
// blocks of all layers. One thread per element (copy) or per 16 bytes (blocks); bound by memory
// bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

template <typename S, typename D>
struct Convert {
  __device__ static D Run(S x) { return FromFloat<D>(ToFloat(x)); }
};
template <typename T>
struct Convert<T, T> {
  __device__ static T Run(T x) { return x; }
};

template <typename S, typename D>
__global__ void CopyRowsKernel(const S* src, int64_t src_stride, D* dst, int64_t dst_stride,
                               int64_t rows, int64_t cols) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * cols; i += step) {
    const int64_t row = i / cols, col = i % cols;
    dst[row * dst_stride + col] = Convert<S, D>::Run(src[row * src_stride + col]);
  }
}

template <typename S, typename D>
void CopyRows(const TensorView& src, const TensorView& dst, cudaStream_t stream) {
  const int64_t blocks = CeilDiv(src.num_elements(), 256);
  CopyRowsKernel<S, D><<<static_cast<int>(blocks < 4096 ? blocks : 4096), 256, 0, stream>>>(
      src.as<S>(), src.stride[0], dst.as<D>(), dst.stride[0], src.shape[0], src.shape[1]);
}

template <typename S>
void CopyRowsFrom(const TensorView& src, const TensorView& dst, cudaStream_t stream) {
  if (dst.dtype == DType::kF32) {
    CopyRows<S, float>(src, dst, stream);
  } else if (dst.dtype == DType::kBF16) {
    CopyRows<S, Bf16>(src, dst, stream);
  } else {
    CopyRows<S, F16>(src, dst, stream);
  }
}

// T: the widest word that divides a block.
template <typename T>
__global__ void CopyBlocksKernel(T* pool, BlockPairs pairs, int64_t plane_words,
                                 int64_t block_words) {
  T* plane = pool + blockIdx.z * plane_words;
  const T* src = plane + pairs.src[blockIdx.y] * block_words;
  T* dst = plane + pairs.dst[blockIdx.y] * block_words;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < block_words; i += step)
    dst[i] = src[i];
}

}  // namespace

cudaError_t LaunchCopy(const TensorView& src, const TensorView& dst, cudaStream_t stream) {
  if (src.num_elements() == 0) return cudaSuccess;
  if (src.dtype == DType::kF32) {
    CopyRowsFrom<float>(src, dst, stream);
  } else if (src.dtype == DType::kBF16) {
    CopyRowsFrom<Bf16>(src, dst, stream);
  } else if (src.dtype == DType::kF16) {
    CopyRowsFrom<F16>(src, dst, stream);
  } else if (src.dtype == DType::kI32) {
    CopyRows<int32_t, int32_t>(src, dst, stream);
  } else {
    CopyRows<uint8_t, uint8_t>(src, dst, stream);
  }
  return cudaGetLastError();
}

cudaError_t FindKernels() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, CopyBlocksKernel<int4>);
}

cudaError_t LaunchCopyBlocks(const TensorView& pool, const BlockPairs& pairs, int n,
                             cudaStream_t stream) {
  const int64_t block_bytes = pool.shape[2] * pool.shape[3] * SizeOf(pool.dtype);
  if (n == 0 || block_bytes == 0 || pool.shape[0] == 0) return cudaSuccess;
  const auto launch = [&](auto word) {
    using Word = decltype(word);
    const int64_t words = block_bytes / static_cast<int64_t>(sizeof(Word));
    const dim3 grid(static_cast<unsigned>(CeilDiv(words, 256) < 8 ? CeilDiv(words, 256) : 8), n,
                    static_cast<unsigned>(pool.shape[0]));
    CopyBlocksKernel<Word>
        <<<grid, 256, 0, stream>>>(pool.as<Word>(), pairs, words * pool.shape[1], words);
  };
  if (block_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(pool.data) % 16 == 0) {
    launch(int4{});
  } else {
    launch(uint16_t{});
  }
  return cudaGetLastError();
}

}  // namespace coppice::cuda
