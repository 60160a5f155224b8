// How a bf16 parameter and its 16-bit remainder make an exact f32 master, as ops::AdamWParams has
// it: master bits = (param << 16) + signed remainder, the parameter being the master rounded to
// nearest, halves away from zero.
#pragma once

#include <bit>
#include <cstdint>

namespace coppice {

struct MasterParts {
  uint16_t param = 0;  // bits of a bf16
  int16_t remainder = 0;

  friend bool operator==(const MasterParts&, const MasterParts&) = default;
};

inline float JoinMaster(const MasterParts& parts) {
  return std::bit_cast<float>((uint32_t{parts.param} << 16) +
                              static_cast<uint32_t>(int32_t{parts.remainder}));
}

inline MasterParts SplitMaster(float master) {
  const uint32_t bits = std::bit_cast<uint32_t>(master);
  return {.param = static_cast<uint16_t>((bits + 0x8000u) >> 16),
          .remainder = static_cast<int16_t>(bits & 0xffffu)};
}

}  // namespace coppice
