#include "server/placement/prefix_hash.h"

#include <openssl/evp.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace coppice {
namespace {

static_assert(std::endian::native == std::endian::little, "token ids are hashed as stored");

constexpr char kVersion[] = "coppice-prefix-1";
// Odd numbers with about as many ones as zeros.
constexpr uint64_t kLeft = 0x9ae16a3b2f90404f, kRight = 0xc3a5c85c97cb3127;

absl::string_view Bytes(absl::Span<const int32_t> ids) {
  return {reinterpret_cast<const char*>(ids.data()), ids.size() * sizeof(int32_t)};
}

uint64_t Load64(const char* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof(word));
  return word;
}

// Two independent chains of 64 x 64 -> 128 bit products, 32 bytes a turn.
uint64_t HashBytes(absl::string_view bytes, uint64_t seed) {
  uint64_t left = MixHash(seed, 1), right = MixHash(seed, 2);
  for (; bytes.size() >= 32; bytes.remove_prefix(32)) {
    left = MixHash(left ^ Load64(bytes.data()), Load64(bytes.data() + 8));
    right = MixHash(right ^ Load64(bytes.data() + 16), Load64(bytes.data() + 24));
  }
  char rest[32] = {};
  if (!bytes.empty()) std::memcpy(rest, bytes.data(), bytes.size());
  left = MixHash(left ^ Load64(rest), Load64(rest + 8));
  right = MixHash(right ^ Load64(rest + 16), Load64(rest + 24));
  return MixHash(left ^ bytes.size(), right);
}

}  // namespace

uint64_t MixHash(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a ^ kLeft) * (b ^ kRight);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t HashName(absl::string_view name, uint64_t seed) { return HashBytes(name, seed); }

uint64_t PrefixHash(const PromptView& prompt) {
  char kind = 's';
  absl::string_view content = prompt.text.substr(0, kPrefixTextBytes);
  if (!prompt.cache_key.empty()) {
    kind = 'k';
    content = prompt.cache_key;
  } else if (prompt.text.empty()) {
    kind = 't';
    content = Bytes(prompt.token_ids.subspan(0, kPrefixTokens));
  }
  const auto name_bytes = static_cast<uint32_t>(prompt.name_space.size());
  std::string input(kVersion);
  input.append(reinterpret_cast<const char*>(&name_bytes), sizeof(name_bytes));
  input.append(prompt.name_space.data(), prompt.name_space.size());
  input.push_back(kind);
  input.append(content.data(), content.size());
  uint8_t digest[EVP_MAX_MD_SIZE];
  CHECK_EQ(EVP_Digest(input.data(), input.size(), digest, nullptr, EVP_sha256(), nullptr), 1);
  uint64_t hash = 0;
  for (int i = 0; i < 8; ++i) hash = hash << 8 | digest[i];
  return hash;
}

std::string PrefixHashToHeader(uint64_t hash) {
  return absl::StrCat(absl::Hex(hash, absl::kZeroPad16));
}

bool PrefixHashFromHeader(absl::string_view text, uint64_t* hash) {
  constexpr absl::string_view kDigits = "0123456789abcdef";
  if (text.size() != 16) return false;
  uint64_t value = 0;
  for (const char c : text) {
    const size_t digit = kDigits.find(c);
    if (digit == absl::string_view::npos) return false;
    value = value << 4 | digit;
  }
  *hash = value;
  return true;
}

std::vector<uint64_t> BlockHashes(const PromptView& prompt, int64_t max_blocks) {
  constexpr size_t kBlockBytes = kPrefixTokens * sizeof(int32_t);
  static_assert(kBlockBytes == kPrefixTextBytes);
  absl::string_view bytes = prompt.text.empty() ? Bytes(prompt.token_ids) : prompt.text;
  const auto blocks = std::min<int64_t>(bytes.size() / kBlockBytes, max_blocks);
  std::vector<uint64_t> hashes(blocks);
  uint64_t chain = HashName(prompt.name_space, prompt.text.empty() ? 0 : 1);
  for (uint64_t& hash : hashes) {
    hash = chain = HashBytes(bytes.substr(0, kBlockBytes), chain);
    bytes.remove_prefix(kBlockBytes);
  }
  return hashes;
}

}  // namespace coppice
