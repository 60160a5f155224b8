// KvStore: which KV a stem or sample holds. Joins the bookkeeping of RadixCache with the bytes of
// KvPool: match, allocate, publish on schedule, fork after the prompt, grow, give back. Owner and
// thread: Generator, on the engine thread.
//
// A stem's blocks are its lease (published, perhaps computed by another stem in flight) and then
// its own. Full hits: the last token is run once more for its logits, reading the cached KV and
// storing nothing. Errors: a bool or null means "no blocks now, try in a later step"; a Status is a
// device error.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "cache/radix_cache.h"
#include "kernels/model/decoder.h"
#include "kernels/model/kv_pool.h"
#include "server/engine/group.h"

namespace coppice {

class KvStore {
 public:
  struct Options {
    int64_t num_blocks = 0;
    int64_t block_tokens = 16;
    std::string model;  // identity of the weights' origin, for namespaces
  };
  // Allocates the pool. Borrows the decoder.
  static absl::StatusOr<std::unique_ptr<KvStore>> Create(const Options& options,
                                                         const Decoder& decoder);

  // ---- Policy
  // Old entries become unreachable. `replaced`: the weights are of another history (a loaded
  // checkpoint), whatever the number.
  void SetPolicy(PolicyVersion version, bool replaced);
  PolicyVersion policy_version() const { return version_; }

  // ---- Stems
  // Matches, allocates and publishes `tokens`; nothing is run. Null if the pool lacks blocks.
  absl::StatusOr<std::shared_ptr<Stem>> StartStem(const Group& group, std::vector<int32_t> tokens,
                                                  absl::Duration now);
  // Takes in what others have computed since; takes over if they gave up. True if the stem can run
  // its next row.
  bool Refresh(Stem& stem);
  // Rows [next_row, next_row + rows) have run: their KV is committed.
  void Advance(Stem& stem, int64_t rows);
  // Publishes the whole blocks of a complete stem that has not done so on schedule, then drops its
  // KV. Returns the tokens newly published.
  int64_t PublishLate(Stem& stem, const GenerateRequest& request, absl::Duration now);

  // ---- Samples
  // Gives each sprout its own copy of the stem's partial last block; the last one takes the block
  // itself. A sprout for which there is no block stays without KV: its state is kIdle, the others'
  // kDecoding.
  absl::Status Fork(const std::shared_ptr<Stem>& stem, const std::vector<Sprout>& sprouts);
  bool NeedsBlock(const Sample& sample) const;
  // Makes room for one more row. False if the pool lacks a block.
  bool Grow(Sample& sample);
  // Drops the sample's KV; what is complete is published first, unless the request or a policy
  // update forbids it. Returns the tokens newly published.
  int64_t Release(Group& group, int32_t sample_index, absl::Duration now);

  // Blocks that prefilling `num_tokens` and then decoding `samples` takes from the available ones,
  // when `leased_tokens` of them are shared with someone running. Not counting what decoding grows
  // into later.
  int64_t BlocksFor(int64_t num_tokens, int64_t leased_tokens, int64_t samples) const;
  PeekResult Peek(const Group& group, absl::Duration now) const;
  // What the cache holds of a prompt that is to be scored: `cached` is good while the lease lives.
  Lease LeaseCached(const std::string& tenant_salt, const std::vector<int32_t>& prompt,
                    absl::Duration now, CachedPrefix& cached);
  const Namespace& NamespaceOf(const std::string& tenant_salt) const;

  RadixCache& cache() { return cache_; }
  const RadixCache& cache() const { return cache_; }
  const KvPool& pool() const { return pool_; }
  int64_t block_tokens() const { return options_.block_tokens; }

 private:
  KvStore(const Options& options, const Decoder& decoder, KvPool pool);

  BlockSet AllocateOrEmpty(int64_t n, MatchResult& match);
  absl::Status CopyBlock(const std::vector<BlockId>& src, const std::vector<BlockId>& dst);
  PublishOptions PublishAs(const GenerateRequest& request, int64_t committed,
                           absl::Duration now) const;

  const Options options_;
  const Decoder& decoder_;
  KvPool pool_;
  RadixCache cache_;
  PolicyVersion version_{0};
  uint64_t replaced_ = 0;  // how often SetPolicy replaced the weights
  uint64_t next_stem_ = 1;
  std::string kv_layout_;
  // Of the current policy; a hash each, asked for often.
  mutable absl::flat_hash_map<std::string, Namespace> namespaces_;
};

}  // namespace coppice
