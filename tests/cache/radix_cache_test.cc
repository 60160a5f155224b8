// RadixCache, one behaviour a test. Blocks have 4 tokens; Text("a b") stands for the blocks aaaa
// bbbb, so trees read as text.
#include "cache/radix_cache.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_split.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace coppice {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::SizeIs;

constexpr int64_t kBlockTokens = 4;

std::vector<int32_t> Text(absl::string_view letters) {
  std::vector<int32_t> tokens;
  for (absl::string_view word : absl::StrSplit(letters, ' ', absl::SkipEmpty())) {
    tokens.insert(tokens.end(), kBlockTokens, word[0] - 'a');
  }
  return tokens;
}

std::vector<int32_t> operator+(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Namespace TestNamespace(uint64_t version = 1, const std::string& tenant = "t",
                        const std::string& adapter = "") {
  return MakeNamespace({"model", PolicyVersion{version}, adapter, 0, "f32/4", tenant});
}

class RadixCacheTest : public ::testing::Test {
 protected:
  explicit RadixCacheTest(int64_t num_blocks = 16) : cache_({num_blocks, kBlockTokens}) {}
  ~RadixCacheTest() override { EXPECT_EQ(cache_.CheckInvariants(), absl::OkStatus()) << Tree(); }

  MatchResult Match(const std::vector<int32_t>& tokens, MatchOptions options = {}) {
    return cache_.Match(ns_, tokens, options);
  }
  // Extends `lease` to all of `tokens` with fresh blocks.
  int64_t Publish(const std::vector<int32_t>& tokens, Lease& lease, const PublishOptions& options) {
    const int64_t n = (static_cast<int64_t>(tokens.size()) - lease.num_tokens()) / kBlockTokens;
    absl::StatusOr<BlockSet> blocks = cache_.Allocate(n);
    EXPECT_EQ(blocks.status(), absl::OkStatus());
    return cache_.Publish(ns_, tokens, lease, *std::move(blocks), options);
  }
  // Leaves `tokens` in the cache, committed, leased by nobody.
  void Store(const std::vector<int32_t>& tokens, PublishOptions options = {}) {
    options.committed_tokens = static_cast<int64_t>(tokens.size());
    Lease lease = Match(tokens).lease;
    Publish(tokens, lease, options);
  }
  // A producer that has published but computed only `committed` tokens.
  Lease Produce(const std::vector<int32_t>& tokens, int64_t committed = 0, uint64_t owner = 1) {
    Lease lease = Match(tokens, {.owner = RequestId{owner}}).lease;
    Publish(tokens, lease, {.committed_tokens = committed});
    return lease;
  }
  int64_t Cached(const std::vector<int32_t>& tokens) { return Match(tokens).committed_tokens; }
  // The tree without the first line (counters) and the namespace's name.
  std::string Tree() const {
    std::vector<std::string> lines = absl::StrSplit(cache_.ToString(), '\n');
    std::string text = "\n";
    for (const std::string& line : lines) {
      if (line.rfind(' ', 0) == 0) text += line + "\n";
    }
    return text;
  }
  std::string Counters() const {
    const std::vector<std::string> lines = absl::StrSplit(cache_.ToString(), '\n');
    return lines[0];
  }

  Namespace ns_ = TestNamespace();
  RadixCache cache_;
};

TEST_F(RadixCacheTest, EmptyCacheMissesAndSaysNoneStored) {
  const MatchResult miss = Match(Text("a b"));
  EXPECT_TRUE(miss.lease.empty());
  EXPECT_EQ(miss.committed_tokens, 0);
  EXPECT_EQ(miss.miss_reason, MissReason::kNoneStored);
  EXPECT_EQ(Counters(), "blocks: 16 free, 0 leased, 0 cached only, 16 total");
}

TEST_F(RadixCacheTest, WhatWasPublishedIsMatchedWithTheSameBlocks) {
  Lease producer = Produce(Text("a b c"), 12);
  const std::vector<BlockId> blocks = producer.blocks();
  producer.Release();
  const MatchResult hit = Match(Text("a b c"));
  EXPECT_THAT(hit.lease.blocks(), ElementsAreArray(blocks));
  EXPECT_EQ(hit.committed_tokens, 12);
  EXPECT_EQ(hit.miss_reason, MissReason::kNone);
  EXPECT_EQ(Counters(), "blocks: 13 free, 3 leased, 0 cached only, 16 total");
}

TEST_F(RadixCacheTest, SplitsOnlyAtBlockBoundaries) {
  Store(Text("a b c"));
  Store(Text("a b d"));
  EXPECT_EQ(Tree(), R"(
  [0,8) 0 0 0 0 ..
    [8,12) 2 2 2 2
    [8,12) 3 3 3 3
)");
}

TEST_F(RadixCacheTest, MatchInsideANodeSplitsItAndLeasesTheHeadOnly) {
  Store(Text("a b c"));
  const MatchResult hit = Match(Text("a x"));
  EXPECT_EQ(hit.lease.num_tokens(), 4);
  EXPECT_EQ(Tree(), R"(
  [0,4) 0 0 0 0 leases=1
    [4,12) 1 1 1 1 ..
)");
}

TEST_F(RadixCacheTest, SplitKeepsLeasesOnBothHalves) {
  Lease whole = Produce(Text("a b c"), 12);
  const std::vector<BlockId> blocks = whole.blocks();
  Lease head = Match(Text("a b x")).lease;
  EXPECT_EQ(Tree(), R"(
  [0,8) 0 0 0 0 .. leases=2
    [8,12) 2 2 2 2 leases=1
)");
  EXPECT_THAT(whole.blocks(), ElementsAreArray(blocks));
  whole.Release();
  EXPECT_EQ(Tree(), R"(
  [0,8) 0 0 0 0 .. leases=1
    [8,12) 2 2 2 2
)");
}

TEST_F(RadixCacheTest, SplitOfAPartlyCommittedNodeKeepsTheCommittedHead) {
  Lease producer = Produce(Text("a b c d"), 8, /*owner=*/7);
  EXPECT_EQ(Match(Text("a b c x")).committed_tokens, 8);
  EXPECT_EQ(Match(Text("a x")).committed_tokens, 4);
  EXPECT_EQ(Tree(), R"(
  [0,4) 0 0 0 0 leases=1
    [4,12) 1 1 1 1 .. committed=4 producer=7 leases=1
      [12,16) 3 3 3 3 committed=0 producer=7 leases=1
)");
  EXPECT_EQ(cache_.CommittedTokens(producer), 8);
  cache_.Commit(producer, 16);
  EXPECT_EQ(cache_.CommittedTokens(producer), 16);
}

TEST_F(RadixCacheTest, PathPublishedBlockByBlockStaysOneNode) {
  Lease lease = Produce(Text("a"), 4);
  Publish(Text("a b"), lease, {.committed_tokens = 8});
  Publish(Text("a b c"), lease, {.committed_tokens = 12});
  EXPECT_EQ(Tree(), "\n  [0,12) 0 0 0 0 .. leases=1\n");
  EXPECT_THAT(lease.blocks(), SizeIs(3));
}

TEST_F(RadixCacheTest, NodeThatAnotherLeaseEndsAtDoesNotGrow) {
  Lease lease = Produce(Text("a"), 4);
  const Lease other = Match(Text("a")).lease;
  Publish(Text("a b"), lease, {.committed_tokens = 8});
  EXPECT_EQ(other.num_tokens(), 4);
  EXPECT_EQ(Tree(), R"(
  [0,4) 0 0 0 0 leases=2
    [4,8) 1 1 1 1 leases=1
)");
}

TEST_F(RadixCacheTest, NamespacesDoNotMeet) {
  Store(Text("a b"));
  const MatchResult other = cache_.Match(TestNamespace(1, "other tenant"), Text("a b"), {});
  EXPECT_TRUE(other.lease.empty());
  EXPECT_EQ(other.miss_reason, MissReason::kNoneStored);
}

// ---- Publish on schedule

TEST_F(RadixCacheTest, WaiterJoinsTheBlocksInFlight) {
  Lease producer = Produce(Text("a b c"), 0, /*owner=*/1);
  const MatchResult waiter = Match(Text("a b c"), {.owner = RequestId{2}});
  EXPECT_THAT(waiter.lease.blocks(), ElementsAreArray(producer.blocks()));
  EXPECT_EQ(waiter.committed_tokens, 0);
  EXPECT_TRUE(cache_.HasProducer(waiter.lease));
  cache_.Commit(producer, 9);  // two blocks and a token
  EXPECT_EQ(cache_.CommittedTokens(waiter.lease), 8);
  cache_.Commit(producer, 12);
  EXPECT_EQ(cache_.CommittedTokens(waiter.lease), 12);
  EXPECT_FALSE(cache_.HasProducer(waiter.lease));
}

TEST_F(RadixCacheTest, WaiterTakesOverFromADeadProducer) {
  Lease producer = Produce(Text("a b c"), 4, /*owner=*/1);
  Lease waiter = Match(Text("a b c"), {.owner = RequestId{2}}).lease;
  EXPECT_FALSE(cache_.TakeOver(waiter));
  producer.Release();
  EXPECT_FALSE(cache_.HasProducer(waiter));
  EXPECT_EQ(Tree(), "\n  [0,12) 0 0 0 0 .. committed=4 producer=none leases=1\n");
  EXPECT_TRUE(cache_.TakeOver(waiter));
  EXPECT_TRUE(cache_.HasProducer(waiter));
  EXPECT_EQ(Tree(), "\n  [0,12) 0 0 0 0 .. committed=4 producer=2 leases=1\n");
}

TEST_F(RadixCacheTest, UncommittedBlocksVanishWithTheirLastLease) {
  Lease producer = Produce(Text("a b c"), 4);
  producer.Release();
  EXPECT_EQ(Tree(), "\n  [0,4) 0 0 0 0\n");
  EXPECT_EQ(Counters(), "blocks: 15 free, 0 leased, 1 cached only, 16 total");
  Lease second = Produce(Text("x y"), 0);
  second.Release();
  EXPECT_EQ(Tree(), "\n  [0,4) 0 0 0 0\n");
}

TEST_F(RadixCacheTest, OnlyTheUnleasedTailOfADeadProducerVanishes) {
  Lease producer = Produce(Text("a b c d"), 0);
  Lease waiter = Match(Text("a b x")).lease;
  producer.Release();
  EXPECT_EQ(Tree(), "\n  [0,8) 0 0 0 0 .. committed=0 producer=none leases=1\n");
  EXPECT_EQ(waiter.num_tokens(), 8);
}

TEST_F(RadixCacheTest, WaiterPublishesBelowBlocksInFlight) {
  Lease producer = Produce(Text("a b"), 0, /*owner=*/1);
  Lease waiter = Produce(Text("a b c"), 0, /*owner=*/2);
  EXPECT_EQ(Tree(), R"(
  [0,8) 0 0 0 0 .. committed=0 producer=1 leases=2
    [8,12) 2 2 2 2 committed=0 producer=2 leases=1
)");
  cache_.Commit(producer, 8);
  cache_.Commit(waiter, 12);
  EXPECT_EQ(cache_.CommittedTokens(waiter), 12);
}

TEST_F(RadixCacheTest, PublishSwitchesToCommittedTwinsAndFreesTheDuplicates) {
  Lease late = Match(Text("a b c")).lease;  // nothing there yet
  Store(Text("a b"));
  const std::vector<BlockId> stored = Match(Text("a b")).lease.blocks();
  EXPECT_EQ(Publish(Text("a b c"), late, {.committed_tokens = 0}), 1);
  EXPECT_EQ(late.num_tokens(), 12);
  EXPECT_EQ(late.blocks()[0], stored[0]);
  EXPECT_EQ(late.blocks()[1], stored[1]);
  EXPECT_EQ(cache_.CommittedTokens(late), 8);
  EXPECT_EQ(Counters(), "blocks: 13 free, 3 leased, 0 cached only, 16 total");
}

TEST_F(RadixCacheTest, PublishOfCommittedTwinsOnlyEntersNothing) {
  Store(Text("a b c"));
  Lease lease = Match(Text("a b c"), {.skip_read = true}).lease;
  EXPECT_EQ(Publish(Text("a b"), lease, {.committed_tokens = 8}), 0);
  EXPECT_EQ(Tree(), R"(
  [0,8) 0 0 0 0 .. leases=1
    [8,12) 2 2 2 2
)");
}

TEST_F(RadixCacheTest, TwinsInFlightStayPrivate) {
  Lease late = Match(Text("a b c"), {.owner = RequestId{2}}).lease;  // nothing there yet
  Lease producer = Produce(Text("a b c"), 4, /*owner=*/1);
  EXPECT_EQ(Publish(Text("a b c"), late, {}), 0);
  EXPECT_EQ(late.num_tokens(), 12);
  EXPECT_EQ(Tree(), R"(
  [0,4) 0 0 0 0 leases=2
    [4,12) 1 1 1 1 .. committed=0 producer=1 leases=1
    [4,12) 1 1 1 1 .. private committed=0 producer=2 leases=1
)");
  EXPECT_TRUE(cache_.HasProducer(late));
  cache_.Commit(late, 12);
  EXPECT_EQ(cache_.CommittedTokens(late), 12);
  EXPECT_EQ(cache_.CommittedTokens(producer), 4);
  EXPECT_EQ(Cached(Text("a b c")), 4);

  Lease sample = cache_.Share(late);
  Publish(Text("a b c d"), late, {.committed_tokens = 16});
  late.Release();
  EXPECT_EQ(Counters(), "blocks: 11 free, 5 leased, 0 cached only, 16 total");
  sample.Release();
  EXPECT_EQ(Counters(), "blocks: 13 free, 3 leased, 0 cached only, 16 total");
}

TEST_F(RadixCacheTest, SharedLeasesExtendIndependently) {
  Lease prompt = Produce(Text("a b"), 8);
  Lease one = cache_.Share(prompt), two = cache_.Share(prompt);
  EXPECT_EQ(Publish(Text("a b x"), one, {.committed_tokens = 12}), 1);
  EXPECT_EQ(Publish(Text("a b y"), two, {.committed_tokens = 12}), 1);
  EXPECT_EQ(Tree(), R"(
  [0,8) 0 0 0 0 .. leases=3
    [8,12) 23 23 23 23 leases=1
    [8,12) 24 24 24 24 leases=1
)");
  EXPECT_TRUE(cache_.Share(Lease()).empty());
}

TEST_F(RadixCacheTest, DefaultLeaseStartsAPathOnPublish) {
  Lease lease;
  EXPECT_EQ(Publish(Text("a b"), lease, {.committed_tokens = 8}), 2);
  EXPECT_EQ(lease.num_tokens(), 8);
  EXPECT_EQ(Publish(Text("a b"), lease, {}), 0);  // renews only
  Lease empty;
  EXPECT_EQ(cache_.Publish(ns_, {}, empty, BlockSet(), {}), 0);
}

TEST_F(RadixCacheTest, LeasesMoveAndReleaseOnce) {
  Lease a = Produce(Text("a b"), 8);
  Lease b = std::move(a);
  EXPECT_TRUE(a.empty());  // NOLINT(bugprone-use-after-move)
  a.Release();
  Lease* alias = &b;
  b = std::move(*alias);
  EXPECT_EQ(b.num_tokens(), 8);
  b = Lease();
  EXPECT_EQ(Counters(), "blocks: 14 free, 0 leased, 2 cached only, 16 total");
}

TEST_F(RadixCacheTest, PeekFindsWhatMatchWouldWithoutTouchingIt) {
  Store(Text("a b c"), {.expires_at = absl::Seconds(10)});
  const Lease lease = Match(Text("a")).lease;
  const std::string before = cache_.ToString();
  const PeekResult found = cache_.Peek(ns_, Text("a b x"), absl::Seconds(9));
  EXPECT_EQ(found.matched_tokens, 8);
  EXPECT_EQ(found.leased_tokens, 4);
  EXPECT_EQ(cache_.Peek(ns_, Text("a b x"), absl::Seconds(10)).matched_tokens, 4);
  EXPECT_EQ(cache_.Peek(TestNamespace(2), Text("a"), absl::ZeroDuration()).matched_tokens, 0);
  EXPECT_EQ(cache_.ToString(), before);
  EXPECT_EQ(cache_.Stats().queried_tokens, 12 + 4);
}

TEST_F(RadixCacheTest, OnlyTheProducerProduces) {
  const Lease producer = Produce(Text("a b"), 4);
  const Lease waiter = Match(Text("a b")).lease;
  EXPECT_TRUE(cache_.Produces(producer));
  EXPECT_FALSE(cache_.Produces(waiter));
}

// ---- Partial blocks

TEST_F(RadixCacheTest, PartialBlockNamesTheCommittedBlockThatSharesMostTokens) {
  Store({1, 2, 3, 4});
  Store({1, 2, 9, 9});
  Store({1, 7, 7, 7});
  MatchResult hit = Match({1, 2, 3, 8, 5});
  EXPECT_EQ(hit.partial_tokens, 3);
  EXPECT_EQ(hit.partial_block, Match({1, 2, 3, 4}).lease.blocks()[0]);
  EXPECT_EQ(Match({1, 7, 0, 0}).partial_tokens, 2);
  EXPECT_EQ(Match({1}).partial_tokens, 1);
  EXPECT_EQ(Match({1}).miss_reason, MissReason::kNone);
  EXPECT_EQ(Match({5, 5, 5, 5}).partial_tokens, 0);
}

TEST_F(RadixCacheTest, PartialBlockStaysAliveUntilItsLeaseEnds) {
  Store({1, 2, 3, 4});
  MatchResult hit = Match({1, 2, 9});
  EXPECT_EQ(hit.partial_tokens, 2);
  EXPECT_EQ(cache_.AvailableBlocks(), 15);
  hit.partial_lease.Release();
  EXPECT_EQ(cache_.AvailableBlocks(), 16);
}

TEST_F(RadixCacheTest, BlocksInFlightAreNoPartialSource) {
  const Lease one = Produce({1, 2, 3, 4});
  const Lease two = Produce({1, 2, 3, 6});
  EXPECT_EQ(Match({1, 2, 3, 5}).partial_tokens, 0);
  Store({1, 2, 0, 0});
  Store({1, 2, 9, 9});
  EXPECT_EQ(Match({1, 2, 3, 5}).partial_tokens, 2);  // further away, but there
}

TEST_F(RadixCacheTest, MatchStopsAtMaxTokens) {
  Store(Text("a b c"));
  const MatchResult hit = Match(Text("a b c"), {.max_tokens = 11});
  EXPECT_EQ(hit.committed_tokens, 8);
  EXPECT_EQ(hit.partial_tokens, 3);
  EXPECT_EQ(hit.miss_reason, MissReason::kNone);
}

// ---- Eviction

TEST_F(RadixCacheTest, AllocateEvictsTheLongestUnusedLeafFirst) {
  Store(Text("a b c d"));
  Store(Text("e f g h"));
  Store(Text("i j k l"));
  Match(Text("a b c d"));  // used again
  const BlockSet taken = cache_.Allocate(8).value();
  EXPECT_EQ(Cached(Text("e f g h")), 0);
  EXPECT_EQ(Cached(Text("i j k l")), 16);
  EXPECT_EQ(Cached(Text("a b c d")), 16);
  EXPECT_EQ(cache_.Stats().evicted_blocks, 4);
}

TEST_F(RadixCacheTest, EvictionTrimsTailsSoThatHeadsStay) {
  Store(Text("a b c d"));
  const BlockSet taken = cache_.Allocate(14).value();
  EXPECT_EQ(Tree(), "\n  [0,8) 0 0 0 0 ..\n");
}

TEST_F(RadixCacheTest, ParentsGoAfterTheirChildren) {
  Store(Text("a b c"));
  Store(Text("a b d"));
  BlockSet taken = cache_.Allocate(13).value();  // evicts c
  EXPECT_EQ(Cached(Text("a b d")), 12);
  taken.Append(cache_.Allocate(2).value());  // evicts d, then b
  EXPECT_EQ(Cached(Text("a b")), 4);
  taken.Append(cache_.Allocate(1).value());
  EXPECT_EQ(cache_.Stats().num_nodes, 0);
  EXPECT_EQ(cache_.Stats().num_namespaces, 0);
}

TEST_F(RadixCacheTest, LowPriorityGoesBeforeOld) {
  Store(Text("a b"), {.priority = 80});
  Store(Text("c d"), {.priority = 10});
  Store(Text("e f"), {.priority = 35});
  const BlockSet taken = cache_.Allocate(14).value();
  EXPECT_EQ(Cached(Text("a b")), 8);
  EXPECT_EQ(Cached(Text("e f")), 0);
}

TEST_F(RadixCacheTest, LaterNextUseGoesFirstAndUnknownBeforeAll) {
  Store(Text("a"), {.next_use_tick = 10});
  Store(Text("b"), {.next_use_tick = 90});
  Store(Text("c"));
  BlockSet taken = cache_.Allocate(14).value();
  EXPECT_EQ(Match(Text("c")).miss_reason, MissReason::kEvicted);
  taken.Append(cache_.Allocate(1).value());
  EXPECT_EQ(Cached(Text("b")), 0);
  EXPECT_EQ(Cached(Text("a")), 4);
}

TEST_F(RadixCacheTest, MatchUsesTheNextUseHintUp) {
  Store(Text("a"), {.next_use_tick = 10});
  Store(Text("b"), {.next_use_tick = 90});
  EXPECT_EQ(Cached(Text("a")), 4);  // the session has returned
  const BlockSet taken = cache_.Allocate(15).value();
  EXPECT_EQ(Cached(Text("a")), 0);
  EXPECT_EQ(Cached(Text("b")), 4);
}

TEST_F(RadixCacheTest, LeasedBlocksAreNeverEvicted) {
  const Lease lease = Produce(Text("a b c"), 12);
  Store(Text("a b d"));
  const absl::StatusOr<BlockSet> refused = cache_.Allocate(14);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("need 14, have 12 free and 1 evictable of 16"));
  EXPECT_EQ(Cached(Text("a b d")), 12);  // a refused call evicts nothing
  EXPECT_EQ(cache_.Allocate(13)->size(), 13);
  EXPECT_EQ(Cached(Text("a b c")), 12);
}

TEST_F(RadixCacheTest, RetiredNamespaceIsUnreachableAndGoesFirst) {
  Store(Text("a b"), {.priority = 100});
  const Lease running = Match(Text("a")).lease;
  cache_.Retire(ns_);
  const MatchResult miss = Match(Text("a b"));
  EXPECT_TRUE(miss.lease.empty());
  EXPECT_EQ(miss.miss_reason, MissReason::kPolicyVersion);
  EXPECT_EQ(running.num_tokens(), 4);

  const Namespace old = std::exchange(ns_, TestNamespace(2));
  Store(Text("c d"), {.priority = 0});
  EXPECT_THAT(cache_.ToString(), HasSubstr(ShortHex(old.digest) + " retired"));
  const BlockSet taken = cache_.Allocate(13).value();
  EXPECT_EQ(Cached(Text("c d")), 8);
  cache_.Retire(TestNamespace(99));  // unknown: nothing to do
  cache_.RetireAll();
  EXPECT_EQ(Cached(Text("c d")), 0);
}

// ---- TTL, flush

TEST_F(RadixCacheTest, ExpiredRunsAreNotMatched) {
  Store(Text("a b"), {.expires_at = absl::Seconds(10)});
  EXPECT_EQ(Match(Text("a b"), {.now = absl::Seconds(9)}).committed_tokens, 8);
  const MatchResult miss = Match(Text("a b"), {.now = absl::Seconds(10)});
  EXPECT_EQ(miss.committed_tokens, 0);
  EXPECT_EQ(miss.miss_reason, MissReason::kEvicted);
  EXPECT_EQ(cache_.Stats().evicted_blocks, 0);  // nothing had to make room
}

TEST_F(RadixCacheTest, ARunKeepsItsPrefixAlive) {
  Store(Text("a b"), {.expires_at = absl::Seconds(10)});
  Store(Text("a b c"), {.expires_at = absl::Seconds(20)});
  Store(Text("a b d"), {.expires_at = absl::Seconds(5)});
  EXPECT_EQ(cache_.Expire(absl::Seconds(15)), 1);  // d
  EXPECT_EQ(Cached(Text("a b c")), 12);
  EXPECT_EQ(cache_.Expire(absl::Seconds(20)), 3);
  EXPECT_EQ(Counters(), "blocks: 16 free, 0 leased, 0 cached only, 16 total");
}

TEST_F(RadixCacheTest, LeasedRunsOutliveTheirExpiry) {
  Store(Text("a"), {.expires_at = absl::Seconds(10)});
  Lease lease = Match(Text("a")).lease;
  EXPECT_EQ(cache_.Expire(absl::Seconds(11)), 0);
  lease.Release();
  EXPECT_EQ(cache_.Expire(absl::Seconds(11)), 1);
}

TEST_F(RadixCacheTest, PublishWithoutBlocksRenewsThePath) {
  Store(Text("a b"), {.priority = 10, .expires_at = absl::Seconds(10)});
  Store(Text("a b"), {.priority = 50, .expires_at = absl::Seconds(30)});
  EXPECT_EQ(cache_.Expire(absl::Seconds(20)), 0);
  Store(Text("c d"), {.priority = 40});
  const BlockSet taken = cache_.Allocate(13).value();
  EXPECT_EQ(Cached(Text("a b")), 8);
  EXPECT_EQ(Cached(Text("c d")), 4);
}

TEST_F(RadixCacheTest, FlushDropsWhatNobodyLeases) {
  Store(Text("a b c"));
  const Lease lease = Match(Text("a")).lease;
  const Namespace mine = std::exchange(ns_, TestNamespace(1, "other"));
  Store(Text("x y"));
  EXPECT_EQ(cache_.Flush(&mine), 2);
  EXPECT_EQ(Cached(Text("x y")), 8);
  EXPECT_EQ(cache_.Flush(), 2);
  EXPECT_EQ(cache_.Flush(&ns_), 0);
  EXPECT_EQ(Counters(), "blocks: 15 free, 1 leased, 0 cached only, 16 total");
}

TEST_F(RadixCacheTest, ALongChainOfNodesIsDestroyedWithoutRecursion) {
  constexpr int64_t kNodes = 10000;
  RadixCache cache({kNodes, 1});
  const std::vector<int32_t> tokens(kNodes, 7);
  Lease lease;
  for (int64_t n = 1; n <= kNodes; ++n) {  // the changing priority keeps the node from growing
    cache.Publish(ns_, absl::MakeConstSpan(tokens).first(n), lease, cache.Allocate(1).value(),
                  {.committed_tokens = n, .priority = static_cast<int32_t>(n)});
  }
  EXPECT_EQ(cache.Stats().num_nodes, kNodes);
  lease.Release();
  EXPECT_EQ(cache.CheckInvariants(), absl::OkStatus());
}

// ---- Miss reasons

TEST_F(RadixCacheTest, MissReasonsTellWhatHappened) {
  EXPECT_EQ(Match({}).miss_reason, MissReason::kNone);
  EXPECT_EQ(Match({1, 2}).miss_reason, MissReason::kBelowBlock);
  EXPECT_EQ(Match(Text("a"), {.skip_read = true}).miss_reason, MissReason::kOptedOut);
  EXPECT_EQ(Match({}, {.skip_read = true}).miss_reason, MissReason::kNone);
  Store(Text("a b"));
  EXPECT_EQ(Match(Text("a b") + std::vector<int32_t>{9}).miss_reason, MissReason::kBelowBlock);
  EXPECT_EQ(Match(Text("a c")).miss_reason, MissReason::kNoneStored);
  cache_.Flush();
  EXPECT_EQ(Match(Text("a b")).miss_reason, MissReason::kEvicted);
  EXPECT_EQ(Match(Text("a x")).miss_reason, MissReason::kEvicted);  // of the first block
}

TEST_F(RadixCacheTest, MissReasonsTellVersionAndAdapterButNeverOtherTenants) {
  Store(Text("a b"));
  const auto reason = [this](const Namespace& ns) {
    return cache_.Match(ns, Text("a b"), {}).miss_reason;
  };
  EXPECT_EQ(reason(TestNamespace(2)), MissReason::kPolicyVersion);
  EXPECT_EQ(reason(TestNamespace(7)), MissReason::kPolicyVersion);
  EXPECT_EQ(reason(TestNamespace(1, "t", "adapter")), MissReason::kNamespace);
  EXPECT_EQ(reason(TestNamespace(1, "u")), MissReason::kNoneStored);
  EXPECT_EQ(reason(TestNamespace(2, "u", "adapter")), MissReason::kNoneStored);
}

TEST_F(RadixCacheTest, AbandonedBlocksWereNeverStored) {
  Produce(Text("a b"), 4).Release();
  EXPECT_EQ(Match(Text("a b")).miss_reason, MissReason::kNoneStored);
}

TEST_F(RadixCacheTest, StatsCountTokensAndBlocks) {
  Store(Text("a b"));
  Match(Text("a b c"));
  Match({0, 0, 5});
  const CacheStats stats = cache_.Stats();
  EXPECT_EQ(stats.queried_tokens, 8 + 12 + 3);
  EXPECT_EQ(stats.hit_tokens, 8 + 2);
  EXPECT_EQ(stats.published_blocks, 2);
  EXPECT_EQ(stats.num_namespaces, 1);
  EXPECT_EQ(stats.num_nodes, 1);
}

using RadixCacheDeathTest = RadixCacheTest;

TEST_F(RadixCacheDeathTest, LeaseMustNotOutliveItsCache) {
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  EXPECT_DEATH(
      {
        auto cache = std::make_unique<RadixCache>(RadixCache::Options{4, kBlockTokens});
        Lease lease;
        cache->Publish(ns_, Text("a"), lease, cache->Allocate(1).value(), {});
        cache.reset();
      },
      "a Lease outlives its cache");
}

TEST_F(RadixCacheDeathTest, PublishWantsTheWholePath) {
  ::testing::GTEST_FLAG(death_test_style) = "threadsafe";
  Lease lease = Produce(Text("a"), 4);
  EXPECT_DEATH(cache_.Publish(ns_, Text("b"), lease, cache_.Allocate(1).value(), {}),
               "CHECK failed");
}

}  // namespace
}  // namespace coppice
