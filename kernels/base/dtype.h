// Element types of tensors. A POD header: safe to include from .cu files.
#pragma once

#include <cstdint>

namespace coppice {

enum class DType : int8_t { kF32, kBF16, kF16, kI32, kU8 };

constexpr int64_t SizeOf(DType t) {
  switch (t) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kU8:
      return 1;
  }
  return 0;
}

constexpr const char* Name(DType t) {
  switch (t) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kI32:
      return "i32";
    case DType::kU8:
      return "u8";
  }
  return "?";
}

}  // namespace coppice
