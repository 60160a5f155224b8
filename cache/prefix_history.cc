#include "cache/prefix_history.h"

#include <cstring>

#include "kernels/base/check.h"

namespace coppice {
namespace {

// Both halves of a 64 x 64 bit product, folded: every input bit reaches every output bit.
uint64_t Fold(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

constexpr uint64_t kOdd1 = 0x9E3779B97F4A7C15u;  // 2^64 / golden ratio
constexpr uint64_t kOdd2 = 0xD1B54A32D192ED03u;  // 2^64 / plastic number, made odd

}  // namespace

uint64_t ExtendFingerprint(uint64_t prefix, absl::Span<const int32_t> block) {
  uint64_t h = prefix ^ kOdd1;
  for (size_t i = 0; i < block.size(); i += 2) {
    const uint64_t low = static_cast<uint32_t>(block[i]);
    const uint64_t high = i + 1 < block.size() ? static_cast<uint32_t>(block[i + 1]) : ~uint32_t{0};
    h = Fold(h ^ (low | high << 32), kOdd2) + kOdd1;
  }
  return h;
}

PrefixHistory::PrefixHistory(int64_t num_prefixes) {
  size_t size = 1;
  while (size < static_cast<size_t>(num_prefixes)) size *= 2;
  slots_.resize(size);
}

uint64_t PrefixHistory::Key(const Namespace& ns, uint64_t prefix) {
  return Fold(prefix ^ ns.tenant, kOdd2) | 1;  // never 0; Index drops that bit
}

uint64_t PrefixHistory::Storer(const Namespace& ns) {
  uint64_t value;
  std::memcpy(&value, ns.digest.data(), sizeof(value));
  return value;
}

void PrefixHistory::Remember(const Namespace& ns, uint64_t prefix) {
  const uint64_t key = Key(ns, prefix);
  slots_[Index(key)] = {key, Storer(ns), ns.family};
}

MissReason PrefixHistory::Explain(const Namespace& ns, uint64_t prefix) const {
  const uint64_t key = Key(ns, prefix);
  const Slot& slot = slots_[Index(key)];
  if (slot.key != key) return MissReason::kNoneStored;
  if (slot.storer == Storer(ns)) return MissReason::kEvicted;
  if (slot.family == ns.family) return MissReason::kPolicyVersion;
  return MissReason::kNamespace;
}

}  // namespace coppice
