#include "kernels/model/stored_tensor.h"

#include <bit>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace coppice {
namespace {

// Exact for every half, subnormals included: the exponent is rebased by a multiplication with
// 2^112.
inline float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t infinite = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | infinite | sign);
}

inline float LoadHalf(const char* p) {
  uint16_t half;
  std::memcpy(&half, p, sizeof(half));
  return HalfToFloat(half);
}

void FromHalf(const char* data, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = LoadHalf(data + 2 * i);
}

void FromBf16(const char* data, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t high;
    std::memcpy(&high, data + 2 * i, sizeof(high));
    out[i] = std::bit_cast<float>(static_cast<uint32_t>(high) << 16);
  }
}

// [scale f16][32 x int8]: x = scale * q
void FromQ8_0(const char* data, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, data += 34, out += kQuantBlock) {
    const float scale = LoadHalf(data);
    const int8_t* q = reinterpret_cast<const int8_t*>(data + 2);
    for (int64_t i = 0; i < kQuantBlock; ++i) out[i] = scale * static_cast<float>(q[i]);
  }
}

// 16 bytes: low nibbles are elements 0..15, high nibbles 16..31; x = scale * (q - zero) + min
void FromNibbles(const uint8_t* q, float scale, int zero, float min, float* out) {
  constexpr int64_t kHalf = kQuantBlock / 2;
  for (int64_t i = 0; i < kHalf; ++i) {
    out[i] = scale * static_cast<float>((q[i] & 15) - zero) + min;
    out[i + kHalf] = scale * static_cast<float>((q[i] >> 4) - zero) + min;
  }
}

void FromQ4_0(const char* data, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, data += 18, out += kQuantBlock) {
    FromNibbles(reinterpret_cast<const uint8_t*>(data + 2), LoadHalf(data), 8, 0.0f, out);
  }
}

void FromQ4_1(const char* data, int64_t num_blocks, float* out) {
  for (int64_t b = 0; b < num_blocks; ++b, data += 20, out += kQuantBlock) {
    FromNibbles(reinterpret_cast<const uint8_t*>(data + 4), LoadHalf(data), 0, LoadHalf(data + 2),
                out);
  }
}

}  // namespace

void Dequantize(StoredType t, const char* data, int64_t num_blocks, float* out) {
  switch (t) {
    case StoredType::kF32:
      std::memcpy(out, data, num_blocks * sizeof(float));
      return;
    case StoredType::kF16:
      return FromHalf(data, num_blocks, out);
    case StoredType::kBF16:
      return FromBf16(data, num_blocks, out);
    case StoredType::kQ8_0:
      return FromQ8_0(data, num_blocks, out);
    case StoredType::kQ4_0:
      return FromQ4_0(data, num_blocks, out);
    case StoredType::kQ4_1:
      return FromQ4_1(data, num_blocks, out);
  }
}

std::optional<int64_t> StoredBytes(StoredType t, const std::vector<int64_t>& shape) {
  int64_t elements = 1;
  for (const int64_t dim : shape) {
    if (dim < 0 || __builtin_mul_overflow(elements, dim, &elements)) return std::nullopt;
  }
  const int64_t block = BlockElements(t);
  // A vector is read element by element, so its "row" is one element and cannot be quantised.
  const int64_t row = shape.size() < 2 ? 1 : shape.back();
  int64_t bytes;
  if (row % block != 0 || __builtin_mul_overflow(elements / block, BlockBytes(t), &bytes)) {
    return std::nullopt;
  }
  return bytes;
}

absl::Status StoredTensor::ReadRows(int64_t row_begin, int64_t row_end, float* out) const {
  const int64_t rows = shape.empty() ? 0 : shape[0];
  if (row_begin < 0 || row_end < row_begin || row_end > rows) {
    return absl::InvalidArgumentError(absl::StrCat("read rows: want a range inside [0, ", rows,
                                                   "), got [", row_begin, ", ", row_end, ")"));
  }
  if (row_begin == row_end) return absl::OkStatus();
  const int64_t row_bytes = static_cast<int64_t>(data.size()) / rows;
  Dequantize(type, data.data() + row_begin * row_bytes,
             (row_end - row_begin) * row_bytes / BlockBytes(type), out);
  return absl::OkStatus();
}

}  // namespace coppice
