// How a 16-bit parameter and its 16-bit remainder make an f32 master, as ops::AdamWParams has it.
//
// bf16: master bits = (param << 16) + signed remainder, the parameter being the master rounded to
// nearest, halves away from zero. Every f32 is its parts.
//
// f16: master = param + remainder * 2^-16 of the parameter's unit in the last place, added in f32;
// the parameter is the master rounded to nearest even. Masters end at 65,504. Those of at least
// 2^-16 are their parts (halves are one remainder short, which the sum rounds away), smaller ones
// to 2^-40. What was joined is its parts whatever its size, so that a checkpoint loses nothing.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/base/dtype.h"
#include "kernels/base/float16.h"

namespace coppice {

struct MasterParts {
  uint16_t param = 0;  // bits of a bf16 or f16
  int16_t remainder = 0;

  friend bool operator==(const MasterParts&, const MasterParts&) = default;
};

// 2^-16 of the unit in the last place of an f16.
inline float F16RemainderUnit(uint16_t bits) {
  const int exponent = std::max(bits >> 10 & 0x1f, 1);
  return std::ldexp(1.0f, exponent - 25 - 16);
}

inline float JoinMaster(DType dtype, const MasterParts& parts) {
  if (dtype == DType::kBF16) {
    return std::bit_cast<float>((uint32_t{parts.param} << 16) +
                                static_cast<uint32_t>(int32_t{parts.remainder}));
  }
  return FloatFromF16(parts.param) +
         static_cast<float>(parts.remainder) * F16RemainderUnit(parts.param);
}

inline MasterParts SplitMaster(DType dtype, float master) {
  if (dtype == DType::kBF16) {
    const uint32_t bits = std::bit_cast<uint32_t>(master);
    return {.param = static_cast<uint16_t>((bits + 0x8000u) >> 16),
            .remainder = static_cast<int16_t>(bits & 0xffffu)};
  }
  const float x = std::clamp(master, -kMaxF16, kMaxF16);
  const uint16_t param = F16FromFloat(x);
  const float units = (x - FloatFromF16(param)) / F16RemainderUnit(param);
  const float remainder = std::fmax(std::fmin(std::rint(units), 32767.0f), -32767.0f);
  return {.param = param, .remainder = static_cast<int16_t>(remainder)};
}

}  // namespace coppice
