#include "kernels/model/byte_level.h"

#include <array>
#include <cstdint>

#include "kernels/model/utf8.h"

namespace coppice {
namespace {

constexpr int kAlphabetEnd = 0x100 + 68;  // 188 bytes stand for themselves

// Code point -> byte, or -1.
std::array<int16_t, kAlphabetEnd> MakeAlphabet() {
  std::array<int16_t, kAlphabetEnd> bytes;
  bytes.fill(-1);
  int next = 0x100;
  for (int b = 0; b < 256; ++b) {
    const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
    bytes[printable ? b : next++] = static_cast<int16_t>(b);
  }
  return bytes;
}

}  // namespace

std::optional<std::string> ByteLevelToBytes(absl::string_view token) {
  static const std::array<int16_t, kAlphabetEnd> kAlphabet = MakeAlphabet();
  std::string out;
  while (!token.empty()) {
    const Utf8Char c = DecodeUtf8(token);
    if (c.code_point >= kAlphabetEnd || kAlphabet[c.code_point] < 0) return std::nullopt;
    out.push_back(static_cast<char>(kAlphabet[c.code_point]));
    token.remove_prefix(c.length);
  }
  return out;
}

}  // namespace coppice
