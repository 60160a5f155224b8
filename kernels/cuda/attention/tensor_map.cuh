// Bulk-copy descriptions of [rows, heads, head_dim] tensors of 16-bit elements.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace coppice::cuda {

// The encoder lives in the driver; asking the runtime for it spares linking the driver library.
inline decltype(&cuTensorMapEncodeTiled) TensorMapEncoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                     &result);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return encoder;
}

struct MapShape {
  const void* data;
  int64_t rows, row_stride;  // in elements
  int32_t heads, head_dim;
};

// Boxes of 64 columns (128 bytes, swizzled) x `box_rows` rows of one head. Rows past the end load
// as zeros and are not stored.
inline cudaError_t MakeMap(CUtensorMap& map, const MapShape& shape, int box_rows) {
  const auto encode = TensorMapEncoder();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t extent[3] = {static_cast<cuuint64_t>(shape.head_dim),
                                static_cast<cuuint64_t>(shape.heads),
                                static_cast<cuuint64_t>(shape.rows)};
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(shape.head_dim) * 2,
                                static_cast<cuuint64_t>(shape.row_stride) * 2};
  const cuuint32_t box[3] = {64, 1, static_cast<cuuint32_t>(box_rows)}, step[3] = {1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(shape.data), extent, stride,
             box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Boxes of `box` words of a row of `count` 4-byte words.
inline cudaError_t MakeWordMap(CUtensorMap& map, const void* words, int64_t count, int box) {
  const auto encode = TensorMapEncoder();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t extent[1] = {static_cast<cuuint64_t>(count)}, stride[1] = {0};
  const cuuint32_t size[1] = {static_cast<cuuint32_t>(box)}, step[1] = {1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_INT32, 1, const_cast<void*>(words), extent, stride, size,
             step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace coppice::cuda
