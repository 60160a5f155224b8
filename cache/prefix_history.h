// PrefixHistory: what was ever stored, to explain misses after the fact. One slot per hashed
// (tenant, prefix) remembers which namespace stored that prefix last. Thread: the engine's.
//
// Bounds, honestly: the table has a fixed number of slots and a newer prefix overwrites an older
// one in its slot, so old prefixes are forgotten (a miss then reads kNoneStored); of several
// namespaces only the last is remembered; keys are 64-bit fingerprints, not cryptographic: a
// collision gives a wrong reason, never a wrong hit. A tenant's keys are its own, so no reason
// tells what another tenant has stored.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "cache/miss_reason.h"
#include "cache/namespace.h"

namespace coppice {

// Fingerprint of a prefix that ends with `block`, from the fingerprint of the prefix before it (0
// for none).
uint64_t ExtendFingerprint(uint64_t prefix, absl::Span<const int32_t> block);

class PrefixHistory {
 public:
  // Remembers at least `num_prefixes` slots (rounded up to a power of two), 24 bytes each.
  explicit PrefixHistory(int64_t num_prefixes);

  // The prefix's KV was stored under `ns`. O(1).
  void Remember(const Namespace& ns, uint64_t prefix);
  // Why a prefix that is not in the tree of `ns` is missing.
  MissReason Explain(const Namespace& ns, uint64_t prefix) const;

 private:
  struct Slot {
    uint64_t key = 0;     // 0 = empty
    uint64_t storer = 0;  // of the namespace's digest
    uint64_t family = 0;
  };
  static uint64_t Key(const Namespace& ns, uint64_t prefix);
  static uint64_t Storer(const Namespace& ns);
  size_t Index(uint64_t key) const { return (key >> 1) & (slots_.size() - 1); }

  std::vector<Slot> slots_;
};

}  // namespace coppice
