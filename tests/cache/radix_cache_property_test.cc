// 10^6 random operations on RadixCache beside a naive model (naive_cache.h). After each operation
// the conservation law holds, the counters are the model's, and a lease taken at random reads as in
// the model; all leases and CheckInvariants() at intervals (in the short run after each operation).
// Sequences come from two or three letters, so that they meet all the time.
#include <algorithm>
#include <iostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cache/radix_cache.h"
#include "gtest/gtest.h"
#include "tests/cache/naive_cache.h"

namespace coppice {
namespace {

using Tokens = NaiveCache::Tokens;

constexpr int kNamespaces = 3;  // two policy versions, one adapter; one tenant

struct Shape {
  uint64_t seed;
  int64_t num_blocks;
  int block_tokens;
  int letters;
};

class RandomDriver {
 public:
  explicit RandomDriver(const Shape& shape)
      : shape_(shape),
        rng_(shape.seed),
        cache_({shape.num_blocks, shape.block_tokens}),
        model_(shape.num_blocks, shape.block_tokens, kNamespaces) {
    for (uint64_t version : {1, 2}) {
      namespaces_.push_back(MakeNamespace({"model", PolicyVersion{version}, "", 0, "f32", "t"}));
    }
    namespaces_.push_back(MakeNamespace({"model", PolicyVersion{1}, "adapter", 0, "f32", "t"}));
  }

  void Run(int64_t num_operations, int64_t check_every) {
    for (int64_t i = 0; i < num_operations && !::testing::Test::HasFailure(); ++i) {
      Step();
      CheckCounters();
      if (!leases_.empty()) CheckLease(leases_[Random(leases_.size())]);
      if (i % check_every == 0) CheckAll();
      if (::testing::Test::HasFailure()) {
        ADD_FAILURE() << "seed " << shape_.seed << ", operation " << i << ": " << operation_ << "\n"
                      << cache_.ToString();
      }
    }
    while (!leases_.empty()) ReleaseOne();
    sets_.clear();
    EXPECT_EQ(cache_.CheckInvariants(), absl::OkStatus());
    EXPECT_EQ(cache_.AvailableBlocks(), shape_.num_blocks) << "blocks leaked";
  }

  int64_t reasons_told = 0, reasons_forgotten = 0, hits = 0, joins = 0, twins = 0, evictions = 0;

 private:
  struct Held {
    Lease lease;
    NaiveCache::Path path;
  };

  int64_t Random(int64_t n) { return static_cast<int64_t>(rng_() % static_cast<uint64_t>(n)); }
  Tokens RandomTokens(int64_t n) {
    Tokens tokens(n);
    for (int32_t& t : tokens) t = static_cast<int32_t>(Random(shape_.letters));
    return tokens;
  }

  void Step() {
    const int64_t dice = Random(100);
    if (leases_.size() > 24 || (dice < 20 && !leases_.empty())) return ReleaseOne();
    if (dice < 45) return MatchOne();
    if (dice < 65) return PublishOne();
    if (dice < 75) return CommitOne();
    if (dice < 80) return TakeOverOne();
    if (dice < 84) return ShareOne();
    if (dice < 92) return AllocateOrReturn();
    if (dice < 96) return ExpireNow();
    if (dice < 98) return FlushOne();
    if (Random(25) == 0) RetireOne();
  }

  void MatchOne() {
    operation_ = "match";
    int ns = static_cast<int>(Random(kNamespaces));
    Tokens tokens = RandomTokens(Random(6 * shape_.block_tokens));
    if (!leases_.empty() && Random(2) == 0) {  // a relative of someone alive
      const Held& relative = leases_[Random(leases_.size())];
      ns = relative.path.ns;
      const Tokens path = relative.path.tokens();
      std::copy_n(path.begin(), Random(std::min(path.size(), tokens.size()) + 1), tokens.begin());
    }
    Held held = Open(ns);
    const PeekResult peeked = cache_.Peek(namespaces_[ns], tokens, now_);
    model_.Expire(now_);
    const int64_t leased = model_.LeasedTokens(ns, tokens);
    model_.Match(ns, tokens, held.path);
    const int partial = model_.PartialTokens(held.path, tokens);
    MatchResult result = cache_.Match(namespaces_[ns], tokens, {.now = now_});
    EXPECT_EQ(result.lease.num_tokens(), static_cast<int64_t>(held.path.tokens().size()));
    EXPECT_EQ(peeked.matched_tokens, result.lease.num_tokens());
    EXPECT_EQ(peeked.leased_tokens, leased);
    EXPECT_EQ(result.committed_tokens, model_.CommittedTokens(held.path));
    EXPECT_EQ(result.partial_tokens, partial);
    CheckReason(ns, tokens, held.path, result);
    hits += result.committed_tokens > 0;
    joins += result.committed_tokens < result.lease.num_tokens();
    held.lease = std::move(result.lease);
    leases_.push_back(std::move(held));
    if (partial > 0) AdoptPartial(ns, tokens, result);
  }

  // The block to copy holds the right tokens, and its lease covers it. Where the lease ends is the
  // cache's choice.
  void AdoptPartial(int ns, const Tokens& tokens, MatchResult& result) {
    Held held = Open(ns);
    const NaiveCache::Entry* last = model_.Holder(result.partial_lease.blocks().back());
    ASSERT_NE(last, nullptr);
    for (size_t end = shape_.block_tokens; end <= last->prefix.size(); end += shape_.block_tokens) {
      NaiveCache::Entry* e =
          model_.Find(ns, Tokens(last->prefix.begin(), last->prefix.begin() + end));
      ASSERT_NE(e, nullptr);
      model_.Lease(held.path, e);
    }
    const Tokens before = leases_.back().path.tokens();
    const size_t at = before.size() / shape_.block_tokens;
    ASSERT_LT(at, held.path.entries.size());
    EXPECT_EQ(held.path.entries[at]->block, result.partial_block);
    EXPECT_TRUE(held.path.entries[at]->committed);
    EXPECT_EQ(model_.SharedBehind(before, held.path.entries[at]->prefix, tokens),
              result.partial_tokens);
    held.lease = std::move(result.partial_lease);
    leases_.push_back(std::move(held));
  }

  void CheckReason(int ns, const Tokens& tokens, const NaiveCache::Path& path,
                   const MatchResult& result) {
    const size_t matched = path.tokens().size();
    const size_t left = tokens.size() - matched;
    if (left == static_cast<size_t>(result.partial_tokens)) {
      EXPECT_EQ(result.miss_reason, MissReason::kNone);
    } else if (left < static_cast<size_t>(shape_.block_tokens)) {
      EXPECT_EQ(result.miss_reason, MissReason::kBelowBlock);
    } else if (model_.retired(ns)) {
      EXPECT_EQ(result.miss_reason, MissReason::kPolicyVersion);
    } else {
      const int storer =
          model_.LastStorer(Tokens(tokens.begin(), tokens.begin() + matched + shape_.block_tokens));
      const MissReason want = storer < 0               ? MissReason::kNoneStored
                              : storer == ns           ? MissReason::kEvicted
                              : storer == 2 || ns == 2 ? MissReason::kNamespace
                                                       : MissReason::kPolicyVersion;
      ++(result.miss_reason == want ? reasons_told : reasons_forgotten);
      EXPECT_TRUE(result.miss_reason == want || result.miss_reason == MissReason::kNoneStored);
    }
  }

  void PublishOne() {
    if (leases_.empty()) return;
    operation_ = "publish";
    Held& held = leases_[Random(leases_.size())];
    if (held.path.entries.size() > 8) return ReleaseOne();
    BlockSet blocks;
    if (!sets_.empty() && Random(2) == 0) {
      blocks = std::move(sets_.back());
      sets_.pop_back();
    } else if (!Allocate(Random(4), blocks)) {
      return;
    }
    if (Random(3) == 0 && blocks.size() > 1) {
      BlockSet front = blocks.TakeFront(1);
      sets_.push_back(std::move(blocks));
      blocks = std::move(front);
    }
    Tokens tokens = held.path.tokens();
    const Tokens more = RandomTokens(blocks.size() * shape_.block_tokens);
    tokens.insert(tokens.end(), more.begin(), more.end());
    PublishOptions options;
    options.committed_tokens = Random(static_cast<int64_t>(tokens.size()) + 1);
    options.priority = static_cast<int32_t>(Random(3));
    if (Random(3) > 0) options.expires_at = now_ + absl::Seconds(1 + Random(40));
    const int64_t want = model_.Publish(held.path, tokens, blocks.ids(), options);
    const int64_t size = blocks.size();
    const int64_t entered =
        cache_.Publish(namespaces_[held.path.ns], tokens, held.lease, std::move(blocks), options);
    EXPECT_EQ(entered, want);
    twins += entered < size;
    CheckLease(held);
  }

  void CommitOne() {
    if (leases_.empty()) return;
    operation_ = "commit";
    Held& held = leases_[Random(leases_.size())];
    const int64_t n = Random(held.lease.num_tokens() + 3);
    model_.Commit(held.path, n);
    cache_.Commit(held.lease, n);
    CheckLease(held);
  }

  void TakeOverOne() {
    if (leases_.empty()) return;
    operation_ = "take over";
    Held& held = leases_[Random(leases_.size())];
    EXPECT_EQ(cache_.TakeOver(held.lease), model_.TakeOver(held.path));
  }

  void ShareOne() {
    if (leases_.empty()) return;
    operation_ = "share";
    const Held& held = leases_[Random(leases_.size())];
    Held shared = Open(held.path.ns);
    for (NaiveCache::Entry* e : held.path.entries) model_.Lease(shared.path, e);
    shared.lease = cache_.Share(held.lease);
    leases_.push_back(std::move(shared));
  }

  void ReleaseOne() {
    operation_ = "release";
    const int64_t i = Random(leases_.size());
    model_.Release(leases_[i].path);
    leases_[i].lease.Release();
    std::swap(leases_[i], leases_.back());
    leases_.pop_back();
  }

  bool Allocate(int64_t n, BlockSet& blocks) {
    const bool enough = model_.free() + model_.cached_only() >= n;
    const int64_t room_wanted = std::max<int64_t>(0, n - model_.free());
    const int64_t evicted_before = cache_.Stats().evicted_blocks;
    absl::StatusOr<BlockSet> taken = cache_.Allocate(n);
    EXPECT_EQ(taken.ok(), enough);
    if (!taken.ok()) return false;
    EXPECT_EQ(cache_.Stats().evicted_blocks - evicted_before, room_wanted);
    EXPECT_EQ(taken->size(), n);
    EXPECT_EQ(model_.Evicted(taken->ids()), "");
    evictions += room_wanted;
    model_.Take(n);
    blocks = *std::move(taken);
    return true;
  }

  void AllocateOrReturn() {
    operation_ = "allocate";
    BlockSet blocks;
    if (sets_.size() < 4 && Allocate(Random(shape_.num_blocks / 3), blocks)) {
      if (!sets_.empty() && Random(2) == 0) {
        sets_.back().Append(std::move(blocks));
      } else {
        sets_.push_back(std::move(blocks));
      }
    } else if (!sets_.empty()) {
      model_.Return(sets_.back().size());
      sets_.pop_back();
    }
  }

  void ExpireNow() {
    operation_ = "expire";
    now_ += absl::Seconds(Random(10));
    EXPECT_EQ(cache_.Expire(now_), model_.Expire(now_));
  }

  void FlushOne() {
    operation_ = "flush";
    const int ns = static_cast<int>(Random(kNamespaces + 1)) - 1;
    EXPECT_EQ(cache_.Flush(ns < 0 ? nullptr : &namespaces_[ns]), model_.Flush(ns));
  }

  void RetireOne() {
    operation_ = "retire";
    const int ns = static_cast<int>(Random(kNamespaces));
    model_.Retire(ns);
    cache_.Retire(namespaces_[ns]);
  }

  Held Open(int ns) {
    Held held;
    held.path.id = next_lease_++;
    held.path.ns = ns;
    return held;
  }

  void CheckCounters() {
    const CacheStats stats = cache_.Stats();
    EXPECT_EQ(stats.free_blocks + stats.leased_blocks + stats.cached_only_blocks,
              shape_.num_blocks);
    EXPECT_EQ(stats.free_blocks, model_.free());
    EXPECT_EQ(stats.leased_blocks, model_.leased());
    EXPECT_EQ(stats.cached_only_blocks, model_.cached_only());
    EXPECT_EQ(cache_.AvailableBlocks(), stats.free_blocks + stats.cached_only_blocks);
  }

  // The lease holds exactly the blocks whose tokens are its path's.
  void CheckLease(const Held& held) {
    ASSERT_EQ(held.lease.blocks().size(), held.path.entries.size());
    for (size_t i = 0; i < held.path.entries.size(); ++i) {
      EXPECT_EQ(held.lease.blocks()[i], held.path.entries[i]->block);
    }
    EXPECT_EQ(cache_.CommittedTokens(held.lease), model_.CommittedTokens(held.path));
    EXPECT_EQ(cache_.HasProducer(held.lease), model_.Producer(held.path) != 0);
    EXPECT_EQ(cache_.Produces(held.lease), model_.Producer(held.path) == held.path.id);
  }

  void CheckAll() {
    EXPECT_EQ(cache_.CheckInvariants(), absl::OkStatus());
    for (const Held& held : leases_) CheckLease(held);
  }

  const Shape shape_;
  std::mt19937_64 rng_;
  RadixCache cache_;
  NaiveCache model_;
  std::vector<Namespace> namespaces_;
  std::vector<Held> leases_;
  std::vector<BlockSet> sets_;
  absl::Duration now_ = absl::ZeroDuration();
  int next_lease_ = 1;
  std::string operation_;
};

// Random numbers reach every kind of event, so nothing was tested in vain.
void RunShape(const Shape& shape, int64_t operations, int64_t check_every) {
  SCOPED_TRACE(testing::Message() << "seed " << shape.seed);
  std::cout << "seed " << shape.seed << ": " << operations << " operations, " << shape.num_blocks
            << " blocks of " << shape.block_tokens << "\n";
  RandomDriver driver(shape);
  driver.Run(operations, check_every);
  std::cout << "  hits " << driver.hits << ", joins " << driver.joins << ", twins " << driver.twins
            << ", evicted blocks " << driver.evictions << ", reasons told " << driver.reasons_told
            << ", forgotten " << driver.reasons_forgotten << "\n";
  EXPECT_GT(driver.hits, operations / 100);
  EXPECT_GT(driver.joins, operations / 400);
  EXPECT_GT(driver.twins, operations / 400);
  EXPECT_GT(driver.evictions, operations / 400);
  EXPECT_LT(driver.reasons_forgotten, driver.reasons_told);  // more prefixes than the history holds
}

TEST(RadixCachePropertyTest, MillionOperationsAgreeWithTheNaiveModel) {
  RunShape({.seed = 1, .num_blocks = 40, .block_tokens = 2, .letters = 2}, 400000, 1000);
  RunShape({.seed = 2, .num_blocks = 64, .block_tokens = 1, .letters = 3}, 200000, 1000);
  RunShape({.seed = 3, .num_blocks = 24, .block_tokens = 3, .letters = 2}, 200000, 1000);
  RunShape({.seed = 4, .num_blocks = 48, .block_tokens = 4, .letters = 2}, 200000, 1000);
}

TEST(RadixCachePropertyTest, InvariantsHoldAfterEachOperation) {
  for (uint64_t seed = 100; seed < 120; ++seed) {
    RunShape({.seed = seed,
              .num_blocks = 40,
              .block_tokens = 1 + static_cast<int>(seed % 3),
              .letters = 2},
             2000, 1);
  }
}

}  // namespace
}  // namespace coppice
