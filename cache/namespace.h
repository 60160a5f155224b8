// Namespace: what may share cached KV. The SHA-256 over length-prefixed fields is the root key of
// the radix tree *and* the seed of the chained block hash, so that every tier, event and store
// inherits it. Two requests share a block iff their namespaces and all tokens up to the block's end
// are equal.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/types/span.h"
#include "kernels/base/ids.h"

namespace coppice {

struct NamespaceFields {
  std::string model;  // identity of the weights' origin
  PolicyVersion policy_version{0};
  std::string adapter;  // empty = none
  uint64_t adapter_version = 0;
  std::string kv_layout;    // dtype, block_tokens, heads, head_dim
  std::string tenant_salt;  // from the authenticated identity, never from the client's message
};

struct Namespace {
  std::array<uint8_t, 32> digest{};
  // Of parts of the fields, only to explain misses (prefix_history.h), never to share: all but the
  // policy version; the tenant alone.
  uint64_t family = 0;
  uint64_t tenant = 0;

  friend bool operator==(const Namespace& a, const Namespace& b) { return a.digest == b.digest; }
  template <typename H>
  friend H AbslHashValue(H h, const Namespace& n) {
    return H::combine_contiguous(std::move(h), n.digest.data(), n.digest.size());
  }
};

using BlockHash = std::array<uint8_t, 32>;

Namespace MakeNamespace(const NamespaceFields& fields);
// hash(parent, tokens of one whole block); the parent of the first block is the namespace digest.
BlockHash ChainBlockHash(const BlockHash& parent, absl::Span<const int32_t> block);
// Lower-case hex of the first 8 bytes, for logs.
std::string ShortHex(const BlockHash& digest);

}  // namespace coppice
