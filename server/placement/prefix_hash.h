// What placement knows about a prompt: two kinds of hashes.
//
// PrefixHash names a request's home. It is computed alike by the daemon's clients, by the router,
// and, sent as the header x-coppice-prefix-hash, usable by any ring hash in between:
//
//   first 8 bytes, big endian, of SHA-256("coppice-prefix-1"
//       | length of namespace as uint32, little endian | namespace | kind | content)
//
//   kind "k": content = prompt_cache_key, if there is one
//   kind "t": content = the first 256 token ids as int32, little endian
//   kind "s": content = the first 1024 bytes of a text prompt
//
// The namespace is the tenant's name, empty without tenants. The policy version is no part of it:
// a home outlives updates. tests/server/prefix_hash_vectors.json binds all implementations.
//
// BlockHashes names the prompt's blocks for the index of what each replica holds. It is never sent
// anywhere and may change at any time.
//
// Pure functions, any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace coppice {

inline constexpr int64_t kPrefixTokens = 256;
inline constexpr int64_t kPrefixTextBytes = 1024;
inline constexpr char kPrefixHashHeader[] = "x-coppice-prefix-hash";

// A prompt as a request carries it. Borrows.
struct PromptView {
  absl::string_view name_space;         // tenant
  absl::string_view cache_key;          // CacheControl.key, may be empty
  absl::string_view text;               // of a text prompt, else empty
  absl::Span<const int32_t> token_ids;  // [tokens] of a prompt of tokens, else empty
};

uint64_t PrefixHash(const PromptView& prompt);

// 16 lower-case hexadecimal digits, and back; false if `text` is anything else.
std::string PrefixHashToHeader(uint64_t hash);
bool PrefixHashFromHeader(absl::string_view text, uint64_t* hash);

// Of each whole block of 256 tokens (1024 bytes of text), chained: equal hashes mean equal prompts
// up to the end of that block. At most `max_blocks`. Seeded by the namespace. O(bytes).
std::vector<uint64_t> BlockHashes(const PromptView& prompt, int64_t max_blocks);

// A name (replica, session) as a number, seeded by `seed`.
uint64_t HashName(absl::string_view name, uint64_t seed);

// A number whose bits all depend on both arguments.
uint64_t MixHash(uint64_t a, uint64_t b);

}  // namespace coppice
