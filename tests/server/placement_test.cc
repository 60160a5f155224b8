#include "server/placement/placement.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "server/placement/prefix_hash.h"

namespace coppice {
namespace {

constexpr int64_t kSeeds = 10;

std::vector<ReplicaId> AddReplicas(Placement& placement, int64_t count) {
  std::vector<ReplicaId> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(placement.Add(absl::StrCat("coppice-", i)));
  return ids;
}

PlacementRequest ShortRequest(uint64_t key) {
  return {.prefix_hash = MixHash(key, 99), .prompt_tokens = 100, .max_tokens = 100};
}

// A prompt of whole blocks that shares its first blocks with no other group.
std::vector<uint64_t> Chain(uint64_t group, int64_t blocks) {
  std::vector<uint64_t> chain;
  for (int64_t i = 0; i < blocks; ++i) chain.push_back(MixHash(group, i));
  return chain;
}

PlacementRequest Continue(const std::vector<uint64_t>& chain, uint64_t key) {
  return {.prefix_hash = MixHash(key, 99),
          .blocks = chain,
          .prompt_tokens = static_cast<int64_t>(chain.size()) * kPrefixTokens,
          .max_tokens = 100};
}

TEST(PrefixHashTest, AgreesWithTheSharedVectors) {
  const auto vectors = nlohmann::json::parse(
      std::ifstream(std::string(COPPICE_SOURCE_DIR) + "/tests/server/prefix_hash_vectors.json"));
  ASSERT_GE(vectors.size(), 8u);
  for (const auto& vector : vectors) {
    const std::string name_space = vector["namespace"], key = vector["key"], text = vector["text"];
    const auto ids = vector["token_ids"].get<std::vector<int32_t>>();
    const PromptView prompt{name_space, key, text, ids};
    EXPECT_EQ(PrefixHashToHeader(PrefixHash(prompt)), vector["hash"].get<std::string>())
        << vector.dump();
  }
}

TEST(PrefixHashTest, HeaderComesBackAndNothingElseIsTaken) {
  uint64_t hash = 0;
  ASSERT_TRUE(PrefixHashFromHeader(PrefixHashToHeader(0x0123456789abcdef), &hash));
  EXPECT_EQ(hash, 0x0123456789abcdefu);
  for (const char* bad :
       {"", "0123", "0123456789ABCDEF", "0123456789abcdeg", "0123456789abcdef0"}) {
    EXPECT_FALSE(PrefixHashFromHeader(bad, &hash)) << bad;
  }
}

TEST(PrefixHashTest, BlocksAreEqualUpToTheFirstDifference) {
  std::vector<int32_t> a(5 * kPrefixTokens + 7, 1), b = a;
  b[3 * kPrefixTokens] = 2;
  const auto left = BlockHashes({.token_ids = a}, 256), right = BlockHashes({.token_ids = b}, 256);
  ASSERT_EQ(left.size(), 5u);
  for (size_t i = 0; i < left.size(); ++i) EXPECT_EQ(left[i] == right[i], i < 3) << i;
  EXPECT_EQ(BlockHashes({.token_ids = a}, 2).size(), 2u);
  EXPECT_NE(BlockHashes({.name_space = "a", .token_ids = a}, 1),
            BlockHashes({.name_space = "b", .token_ids = a}, 1));
}

TEST(PlacementTest, KeysSpreadEvenly) {
  Placement placement({});
  const std::vector<ReplicaId> ids = AddReplicas(placement, 4);
  std::map<ReplicaId, int> keys;
  for (uint64_t key = 0; key < 20000; ++key) ++keys[*placement.Home(MixHash(key, 5))];
  for (const ReplicaId id : ids) EXPECT_NEAR(keys[id], 5000, 250);
}

TEST(PlacementTest, JoinAndLeaveMoveOnlyTheirShare) {
  Placement placement({});
  const std::vector<ReplicaId> ids = AddReplicas(placement, 4);
  constexpr int kKeys = 10000;
  std::vector<ReplicaId> before;
  for (int key = 0; key < kKeys; ++key) before.push_back(*placement.Home(MixHash(key, 5)));

  const ReplicaId joined = placement.Add("coppice-4");
  int moved = 0;
  for (int key = 0; key < kKeys; ++key) {
    const ReplicaId home = *placement.Home(MixHash(key, 5));
    if (home == before[key]) continue;
    EXPECT_EQ(home, joined);
    ++moved;
  }
  EXPECT_NEAR(moved, kKeys / 5, kKeys / 50);

  placement.Remove(joined);
  for (int key = 0; key < kKeys; ++key) EXPECT_EQ(*placement.Home(MixHash(key, 5)), before[key]);
  placement.SetServing(ids[2], false);
  for (int key = 0; key < kKeys; ++key) {
    const ReplicaId home = *placement.Home(MixHash(key, 5));
    EXPECT_TRUE(before[key] == ids[2] ? home != ids[2] : home == before[key]);
  }
}

TEST(PlacementTest, NoReplicaIsLoadedBeyondTheBound) {
  for (uint64_t seed = 0; seed < kSeeds; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937_64 rng(seed);
    const Placement::Options options{.free_load = 0};
    Placement placement(options);
    const std::vector<ReplicaId> ids = AddReplicas(placement, 5);
    std::vector<Placed> open;
    for (int i = 0; i < 4000; ++i) {
      if (!open.empty() && rng() % 3 == 0) {
        std::swap(open[rng() % open.size()], open.back());
        placement.Finish(open.back(), static_cast<double>(rng() % 500));
        open.pop_back();
        continue;
      }
      // Half of the requests want one replica.
      PlacementRequest request = ShortRequest(rng() % 2 == 0 ? 1 : rng());
      request.n = static_cast<int64_t>(1 + rng() % 8);
      double total = 0, least = 1e300;
      for (const ReplicaId id : ids) {
        total += placement.Load(id);
        least = std::min(least, placement.Load(id));
      }
      open.push_back(*placement.Place(request));
      const Placed& placed = open.back();
      const double mean = (total + placed.charge) / 5;
      EXPECT_TRUE(placed.load + placed.charge <= options.load_bound * mean || placed.load == least)
          << placed.load << " of " << total;
    }
    for (const Placed& placed : open) placement.Finish(placed, -1);
    for (const ReplicaId id : ids) EXPECT_NEAR(placement.Load(id), 0, 1e-6);
  }
}

TEST(PlacementTest, AGroupIsOneChargeOnOneReplica) {
  Placement placement({});
  const std::vector<ReplicaId> ids = AddReplicas(placement, 4);
  PlacementRequest request = ShortRequest(7);
  request.n = 64;
  const Placed placed = *placement.Place(request);
  EXPECT_DOUBLE_EQ(placed.charge, 64 * 100 + 0.03 * 100);
  for (const ReplicaId id : ids) {
    EXPECT_EQ(placement.Load(id), id == placed.replica ? placed.charge : 0);
  }
}

TEST(PlacementTest, SessionsStayUntilTheMarginBreaks) {
  Placement placement({.home_margin = 0});
  const std::vector<ReplicaId> ids = AddReplicas(placement, 2);
  PlacementRequest request = ShortRequest(1);
  request.session = 42;
  const ReplicaId first = placement.Place(request)->replica;
  const ReplicaId other = first == ids[0] ? ids[1] : ids[0];
  // Another key whose home is the other replica: only the session holds it.
  for (uint64_t key = 2; *placement.Home(request.prefix_hash) != other; ++key) {
    request.prefix_hash = MixHash(key, 99);
  }
  const Placed second = *placement.Place(request);
  EXPECT_EQ(second.replica, first);
  EXPECT_EQ(second.by, PlacedBy::kSession);

  // Load far beyond bound and margin.
  PlacementRequest heavy = ShortRequest(1);
  heavy.n = 1000;
  heavy.except = absl::MakeConstSpan(&other, 1);
  placement.Place(heavy);
  const Placed third = *placement.Place(request);
  EXPECT_EQ(third.replica, other);
  EXPECT_EQ(placement.Place(request)->replica, other) << "the session lives there now";
}

TEST(PlacementTest, AConversationIsFoundWithoutASession) {
  Placement placement({});
  const std::vector<ReplicaId> ids = AddReplicas(placement, 4);
  const std::vector<uint64_t> chain = Chain(1, 40);
  const Placed first = *placement.Place(Continue({chain.begin(), chain.begin() + 30}, 1));
  EXPECT_EQ(first.predicted_hit_tokens, 0);
  uint64_t key = 2;  // its first tokens are another home's
  while (*placement.Home(MixHash(key, 99)) == first.replica) ++key;
  const Placed second = *placement.Place(Continue(chain, key));
  EXPECT_EQ(second.replica, first.replica);
  EXPECT_EQ(second.by, PlacedBy::kPrefix);
  EXPECT_EQ(second.predicted_hit_tokens, 30 * kPrefixTokens);
}

TEST(PlacementTest, AReplicaThatReturnsTakesItsKeysBack) {
  Placement placement({});
  const std::vector<ReplicaId> ids = AddReplicas(placement, 4);
  const std::vector<uint64_t> chain = Chain(1, 40);
  PlacementRequest request = Continue(chain, 1);
  request.session = 5;
  const ReplicaId home = placement.Place(request)->replica;
  placement.SetServing(home, false);
  const ReplicaId refuge = placement.Place(request)->replica;
  EXPECT_NE(refuge, home);
  EXPECT_EQ(placement.Place(request)->replica, refuge);
  placement.SetServing(home, true);
  EXPECT_EQ(placement.Place(request)->replica, home);
  EXPECT_EQ(placement.Place(request)->predicted_hit_tokens, request.prompt_tokens);
}

TEST(PlacementTest, WhatWasNotComputedIsNotPredicted) {
  Placement placement({});
  AddReplicas(placement, 1);
  const std::vector<uint64_t> chain = Chain(1, 10);
  placement.Place(Continue({chain.begin(), chain.begin() + 4}, 1));
  const Placed refused = *placement.Place(Continue(chain, 1));
  placement.Withdraw(refused, chain);
  EXPECT_EQ(placement.Place(Continue(chain, 1))->predicted_hit_tokens, 4 * kPrefixTokens);
}

TEST(PlacementTest, TheIndexHoldsWhatTheCacheCan) {
  Placement placement({});
  const ReplicaId only = placement.Add("coppice-0");
  placement.SetCacheTokens(only, 20 * kPrefixTokens);
  for (uint64_t group = 0; group < 5; ++group) placement.Place(Continue(Chain(group, 8), group));
  int64_t held = 0;
  for (uint64_t group = 5; group-- > 0;) {
    const Placed placed = *placement.Place(Continue(Chain(group, 8), group));
    placement.Withdraw(placed, Chain(group, 8));
    held += placed.predicted_hit_tokens;
  }
  EXPECT_LE(held, 20 * kPrefixTokens);
  EXPECT_GE(held, 16 * kPrefixTokens);
  placement.ForgetPrefixes(only);
  EXPECT_EQ(placement.Place(Continue(Chain(4, 8), 4))->predicted_hit_tokens, 0);
}

TEST(PlacementTest, WithoutAReplicaThereIsNoPlace) {
  Placement placement({});
  EXPECT_FALSE(placement.Place(ShortRequest(1)).has_value());
  const std::vector<ReplicaId> ids = AddReplicas(placement, 2);
  PlacementRequest request = ShortRequest(1);
  request.except = ids;
  EXPECT_FALSE(placement.Place(request).has_value());
  request.except = absl::MakeConstSpan(ids).first(1);
  EXPECT_EQ(placement.Place(request)->replica, ids[1]);
  const Placed placed = *placement.Place(request);
  placement.Remove(ids[1]);
  placement.Finish(placed, 10);  // of a replica that left
}

TEST(PlacementTest, TheSameCallsGiveTheSameAnswers) {
  std::vector<ReplicaId> answers[2];
  for (auto& answer : answers) {
    std::mt19937_64 rng(3);
    Placement placement({});
    AddReplicas(placement, 4);
    for (int i = 0; i < 1000; ++i) {
      const std::vector<uint64_t> chain = Chain(rng() % 50, 1 + rng() % 20);
      const Placed placed = *placement.Place(Continue(chain, rng() % 50));
      if (rng() % 2 == 0) placement.Finish(placed, 50);
      answer.push_back(placed.replica);
    }
  }
  EXPECT_EQ(answers[0], answers[1]);
}

}  // namespace
}  // namespace coppice
