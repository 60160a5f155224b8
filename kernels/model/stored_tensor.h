// A tensor as it lies in a file, and its conversion to f32. Quantised types come in blocks of 32
// elements along a row (ggml-quants.h of llama.cpp describes the layouts); all multi-byte values
// are little endian.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace coppice {

enum class StoredType { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1 };

constexpr const char* Name(StoredType t) {
  switch (t) {
    case StoredType::kF32:
      return "f32";
    case StoredType::kF16:
      return "f16";
    case StoredType::kBF16:
      return "bf16";
    case StoredType::kQ8_0:
      return "q8_0";
    case StoredType::kQ4_0:
      return "q4_0";
    case StoredType::kQ4_1:
      return "q4_1";
  }
  return "?";
}

constexpr int64_t kQuantBlock = 32;

constexpr int64_t BlockElements(StoredType t) {
  return t == StoredType::kQ8_0 || t == StoredType::kQ4_0 || t == StoredType::kQ4_1 ? kQuantBlock
                                                                                    : 1;
}

constexpr int64_t BlockBytes(StoredType t) {
  switch (t) {
    case StoredType::kF32:
      return 4;
    case StoredType::kF16:
    case StoredType::kBF16:
      return 2;
    case StoredType::kQ8_0:
      return 2 + kQuantBlock;
    case StoredType::kQ4_0:
      return 2 + kQuantBlock / 2;
    case StoredType::kQ4_1:
      return 4 + kQuantBlock / 2;
  }
  return 0;
}

// Converts `num_blocks` blocks at `data` (any alignment) into num_blocks * BlockElements(t) floats.
void Dequantize(StoredType t, const char* data, int64_t num_blocks, float* out);

// Bytes of a tensor of this type and shape, or nullopt if a size is negative, the product leaves
// int64, or a row is no whole number of blocks.
std::optional<int64_t> StoredBytes(StoredType t, const std::vector<int64_t>& shape);

// INVARIANT: data.size() == *StoredBytes(type, shape).
struct StoredTensor {
  StoredType type = StoredType::kF32;
  std::vector<int64_t> shape;  // row-major, outermost first
  absl::string_view data;      // inside the mapped file

  // Rows [row_begin, row_end) of the outermost dimension as f32. INVALID_ARGUMENT outside the
  // tensor.
  absl::Status ReadRows(int64_t row_begin, int64_t row_end, float* out) const;
};

}  // namespace coppice
