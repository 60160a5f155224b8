// RadixCache: which KV blocks hold which tokens. A tree per namespace whose edges are runs of whole
// blocks; children are keyed by their first block of tokens; splits happen at block boundaries
// only. Host-only bookkeeping: it hands out block ids and never touches their bytes.
//
// Owner and thread: the engine thread, alone. No locks, no clock: order is by logical ticks; expiry
// compares with the `now` that the caller passes.
//
// Life of a block:  free -> (Allocate) owned by a BlockSet -> (Publish) in the tree under a Lease
// -> (lease gone) cached only -> matched again, or evicted -> free.  Conservation law, checked by
// CheckInvariants():
//     free + leased + cached_only == total,   where owned blocks count as leased.
//
// Publish on schedule: a producer publishes the blocks of its prompt when they are allocated,
// before their KV exists, with committed_tokens <= published tokens. Whoever matches them joins the
// producer's prefill (single flight): it waits until CommittedTokens(lease) covers what it needs.
// If the producer gives up (its Lease dies first), HasProducer() turns false and a waiter takes
// over with TakeOver(). Uncommitted blocks without lease are dropped, never cached.
//
// Single flight happens in Match, never in Publish: where the tree's continuation is in flight by
// another, the blocks that Publish was given stay private to the lease (and to leases shared from
// it): their owner computes them for itself, nobody matches them, and they become free with the
// last such lease.
//
// A lease ends at the end of a node; a match that ends inside a node splits it. A lease counts on
// every node from its own to the root, so nodes without leases form whole subtrees and every
// cached-only block can be evicted, leaves first.
//
// Cost: Match and Publish are O(tokens) comparisons plus O(depth * log children) look-ups; Allocate
// is O(blocks evicted + leaves touched * log leaves); queries about a lease are O(depth).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "cache/block_pool.h"
#include "cache/miss_reason.h"
#include "cache/namespace.h"
#include "kernels/base/ids.h"

namespace coppice {

class RadixCache;
struct RadixNode;

// Keeps the blocks of one path alive, from position 0 to num_tokens(). Move-only; releasing never
// fails. Must not outlive its cache.
class Lease {
 public:
  Lease() = default;
  Lease(Lease&& other) noexcept;
  Lease& operator=(Lease&& other) noexcept;
  ~Lease();

  const std::vector<BlockId>& blocks() const { return blocks_; }  // in path order
  int64_t num_tokens() const { return num_tokens_; }              // blocks * block_tokens
  bool empty() const { return num_tokens_ == 0; }
  void Release();

 private:
  friend class RadixCache;
  RadixCache* cache_ = nullptr;
  RadixNode* node_ = nullptr;  // deepest node; the lease ends exactly at its end; null iff empty
  std::vector<BlockId> blocks_;
  int64_t num_tokens_ = 0;
  uint64_t id_ = 0;  // unique per cache; names the producer of in-flight blocks
  RequestId owner_{0};
};

struct MatchOptions {
  RequestId owner{0};                         // whom ToString names as producer
  bool skip_read = false;                     // opt out: matches nothing
  int64_t max_tokens = -1;                    // match at most this many tokens; -1 = all
  absl::Duration now = absl::ZeroDuration();  // for expiry
};

struct MatchResult {
  Lease lease;                   // whole published blocks that match, committed or in flight
  int64_t committed_tokens = 0;  // leading tokens of the lease whose KV exists now
  BlockId partial_block{
      -1};  // a committed block that continues the match for partial_tokens < block_tokens tokens:
  int32_t partial_tokens =
      0;  //   copy it to reuse them. The partial block is kept alive by `partial_lease`.
  Lease partial_lease;
  MissReason miss_reason = MissReason::kNone;
};

struct PeekResult {
  int64_t matched_tokens = 0;  // whole blocks, committed or in flight
  int64_t leased_tokens = 0;   // leading part of them that is leased now: sharing it takes nothing
                               // from AvailableBlocks()
};

// Priority, expiry and next use hold for the new run and, at least, for its whole prefix: a run
// never outlives its prefix.
struct PublishOptions {
  int64_t committed_tokens =
      0;                  // of the whole path; the rest is in flight and the lease is its producer
  int32_t priority = 35;  // 0-100; lower goes first
  std::optional<absl::Duration> expires_at;  // on the clock of MatchOptions::now; absent = never
  // When the session is expected back, on a scale of the caller's choice. Within a priority later
  // goes first, unknown (0) before known. The next Match of the run uses the hint up.
  int64_t next_use_tick = 0;
};

struct CacheStats {
  int64_t total_blocks = 0, free_blocks = 0, leased_blocks = 0, cached_only_blocks = 0;
  int64_t num_nodes = 0, num_namespaces = 0;
  int64_t evicted_blocks = 0, published_blocks = 0;  // since start; evicted = by Allocate
  int64_t queried_tokens = 0,
          hit_tokens = 0;  // since start; hit = committed or copied from a partial block
};

class RadixCache {
 public:
  struct Options {
    int64_t num_blocks = 0;
    int64_t block_tokens = 16;
  };
  explicit RadixCache(const Options& options);
  ~RadixCache();
  RadixCache(const RadixCache&) = delete;
  RadixCache& operator=(const RadixCache&) = delete;

  // The longest published prefix of `tokens` in whole blocks. Never fails; a miss is an empty lease
  // and a reason. Runs Expire(options.now) first. The reason rests on a bounded memory
  // (prefix_history.h): what it forgot is kNoneStored.
  MatchResult Match(const Namespace& ns, absl::Span<const int32_t> tokens,
                    const MatchOptions& options);
  // What Match would find now, without a lease, a touch of use order or a count in Stats(): for the
  // scheduler's estimates.
  PeekResult Peek(const Namespace& ns, absl::Span<const int32_t> tokens, absl::Duration now) const;
  // Another lease on the same path, e.g. one for each sample of a group. It produces nothing.
  Lease Share(const Lease& lease);

  // Takes n blocks, evicting cached-only leaves as needed. RESOURCE_EXHAUSTED with want, free and
  // evictable blocks.
  absl::StatusOr<BlockSet> Allocate(int64_t n);
  // Blocks that Allocate could deliver now.
  int64_t AvailableBlocks() const;

  // Extends the lease over `blocks`, the KV of the tokens behind it. `tokens` is the whole path:
  // lease.num_tokens() + blocks.size() * block_tokens tokens. Afterwards lease.blocks() covers all
  // of `tokens`; block by block
  //   - equal tokens are committed in the tree: the lease switches to the tree's block, the
  //   duplicate becomes free;
  //   - equal tokens are in flight in the tree: this block and all behind it stay private to the
  //   lease;
  //   - otherwise the block enters the tree.
  // So read lease.blocks() and CommittedTokens(lease) again before writing KV. Returns the number
  // of blocks entered. An empty `blocks` renews priority, expiry and next use of the path.
  int64_t Publish(const Namespace& ns, absl::Span<const int32_t> tokens, Lease& lease,
                  BlockSet blocks, const PublishOptions& options);

  // The KV of the path's first num_tokens tokens now exists. Counts whole blocks of the lease;
  // tokens behind them are the caller's own and ignored.
  void Commit(Lease& lease, int64_t num_tokens);
  // Leading tokens of the lease's path whose KV exists now, in whole blocks.
  int64_t CommittedTokens(const Lease& lease) const;
  // Whether a lease alive (perhaps this one) is computing the first uncommitted block of the path;
  // false if all is committed.
  bool HasProducer(const Lease& lease) const;
  // Whether this lease is the one computing the first uncommitted block of the path.
  bool Produces(const Lease& lease) const;
  // Makes the lease the producer of every uncommitted, producerless block of its path. False if
  // there is none.
  bool TakeOver(Lease& lease);

  // Drops every cached-only block of one namespace or of all. Returns the blocks freed.
  int64_t Flush(const Namespace* ns = nullptr);
  // Drops cached-only runs that have expired. Returns the blocks freed.
  int64_t Expire(absl::Duration now);
  // Entries of `ns` are unreachable from now on (an old policy version): Match misses, leases stay
  // valid, and what they leave is evicted before anything else. RetireAll: every namespace that
  // exists now, for a policy update.
  void Retire(const Namespace& ns);
  void RetireAll();

  // Counters, O(1).
  CacheStats Stats() const;
  int64_t block_tokens() const { return options_.block_tokens; }

  // INTERNAL naming the broken invariant. O(tree).
  absl::Status CheckInvariants() const;
  // The tree, one node a line, for tests and Admin.
  std::string ToString() const;

 private:
  friend class Lease;
  struct Impl;
  Options options_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace coppice
