#include "server/engine/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace coppice {

void PrintTo(const SampleKey& key, std::ostream* out) {
  *out << Raw(key.request) << '/' << key.sample;
}

namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

WaitingView Waiting(uint64_t id, int64_t uncached = 100, int64_t blocks = 1) {
  return {.id = RequestId{id}, .uncached_tokens = uncached, .blocks = blocks};
}

SampleKey Key(uint64_t id, int32_t sample = 0) { return {RequestId{id}, sample}; }

AdmissionInput RoomFor(int64_t blocks, int64_t samples) {
  AdmissionInput input;
  input.available_blocks = blocks;
  input.free_samples = samples;
  return input;
}

TEST(PlanAdmissionTest, LongestCachedGoesFirstWithinATenant) {
  AdmissionInput input = RoomFor(100, 2);
  input.waiting = {Waiting(1, 300), Waiting(2, 10), Waiting(3, 200)};
  EXPECT_THAT(PlanAdmission(input).admit, ElementsAre(RequestId{2}, RequestId{3}));
}

TEST(PlanAdmissionTest, AgeingOvertakesTheCachedOnes) {
  AdmissionInput input = RoomFor(100, 1);
  input.waiting = {Waiting(1, 3000), Waiting(2, 10)};
  input.waiting[0].waited = absl::Seconds(4);
  EXPECT_THAT(PlanAdmission(input).admit, ElementsAre(RequestId{1}));
}

TEST(PlanAdmissionTest, PriorityGoesFirstUntilTheOthersHaveAged) {
  AdmissionInput input = RoomFor(100, 1);
  input.waiting = {Waiting(1), Waiting(2)};
  input.waiting[1].priority = 2;
  EXPECT_THAT(PlanAdmission(input).admit, ElementsAre(RequestId{2}));
  input.waiting[0].waited = 3 * kPriorityAgeing;
  EXPECT_THAT(PlanAdmission(input).admit, ElementsAre(RequestId{1}));
}

TEST(PlanAdmissionTest, TheLeastServedTenantGoesFirst) {
  AdmissionInput input = RoomFor(100, 4);
  for (uint64_t id = 1; id <= 6; ++id) {
    input.waiting.push_back(Waiting(id, 100));
    input.waiting.back().tenant = id <= 4 ? "busy" : "quiet";
  }
  input.tenant_tokens = {{"busy", 150}, {"quiet", 0}};
  // 5 costs "quiet" 101 tokens, which leaves it below "busy" once more.
  EXPECT_THAT(PlanAdmission(input).admit,
              ElementsAre(RequestId{5}, RequestId{6}, RequestId{1}, RequestId{2}));
}

TEST(PlanAdmissionTest, TakesNoMoreThanBlocksAndSamplesAllow) {
  AdmissionInput input = RoomFor(10, 5);
  input.holding = {{.key = Key(1)}};  // keeps one block for its future
  input.waiting = {Waiting(2, 1, 4), Waiting(3, 2, 4), Waiting(4, 3, 4)};
  EXPECT_THAT(PlanAdmission(input).admit, ElementsAre(RequestId{2}, RequestId{3}));
  input.waiting[0].samples = 5;
  EXPECT_THAT(PlanAdmission(input).admit, ElementsAre(RequestId{2}));
}

TEST(PlanAdmissionTest, WhatDoesNotFitIsPassedOverOnlySoLong) {
  AdmissionInput input = RoomFor(10, 5);
  input.holding = {{.key = Key(1)}};
  input.waiting = {Waiting(2, 1, 50), Waiting(3, 9000, 2)};
  EXPECT_THAT(PlanAdmission(input).admit, ElementsAre(RequestId{3}));
  input.waiting[0].waited = kMaxPassedOver;
  EXPECT_THAT(PlanAdmission(input).admit, IsEmpty());
}

TEST(PlanAdmissionTest, WhenNothingRunsTheFirstNeedNotFit) {
  AdmissionInput input = RoomFor(10, 5);
  input.waiting = {Waiting(2, 1, 50), Waiting(3, 2, 50)};
  EXPECT_THAT(PlanAdmission(input).admit, ElementsAre(RequestId{2}));
}

TEST(PlanAdmissionTest, AClosedGateAdmitsNobodyButResumes) {
  AdmissionInput input = RoomFor(10, 5);
  input.open = false;
  input.waiting = {Waiting(2)};
  input.idle = {{.key = Key(1), .blocks = 1}};
  const AdmissionPlan plan = PlanAdmission(input);
  EXPECT_THAT(plan.resume, ElementsAre(Key(1)));
  EXPECT_THAT(plan.admit, IsEmpty());
}

TEST(PlanAdmissionTest, RetractsTheYoungestOfTheLowestPriority) {
  AdmissionInput input = RoomFor(1, 5);
  input.waiting = {Waiting(9)};
  for (uint64_t id = 1; id <= 4; ++id) {
    input.holding.push_back({.key = Key(id), .freeable_blocks = 1, .needs_block = true});
  }
  input.holding[1].priority = -1;
  // Four want a block, one is there. Without 2: three want, two are there. Without 4: two and
  // three.
  const AdmissionPlan plan = PlanAdmission(input);
  EXPECT_THAT(plan.retract, ElementsAre(Key(2), Key(4)));
  EXPECT_THAT(plan.admit, IsEmpty());
}

TEST(PlanAdmissionTest, NeverRetractsTheLastOne) {
  AdmissionInput input = RoomFor(0, 5);
  input.holding = {{.key = Key(1, 0), .needs_block = true},
                   {.key = Key(1, 1), .needs_block = true}};
  EXPECT_THAT(PlanAdmission(input).retract, ElementsAre(Key(1, 1)));
}

TEST(PlanAdmissionTest, ResumesTheOldestFirstAndAdmitsNobodyBefore) {
  AdmissionInput input = RoomFor(6, 5);
  input.holding = {{.key = Key(1)}};
  input.idle = {{.key = Key(3), .blocks = 3}, {.key = Key(2), .blocks = 3}};
  input.waiting = {Waiting(4, 1, 1)};
  const AdmissionPlan plan = PlanAdmission(input);
  EXPECT_THAT(plan.resume, ElementsAre(Key(2)));
  EXPECT_THAT(plan.admit, IsEmpty());
}

// A request that is low in every respect - priority, tenant, cached tokens - against a stream of
// better ones that never ends.
TEST(PlanAdmissionTest, AnEndlessStreamStarvesNobody) {
  AdmissionInput input = RoomFor(100, 1);
  input.waiting = {Waiting(1, 5000)};
  input.waiting[0].tenant = "busy";
  input.tenant_tokens = {{"busy", 1e6}};
  for (uint64_t step = 2;; ++step) {
    ASSERT_LT(step, 60u);
    input.waiting.push_back(Waiting(step, 1));
    input.waiting.back().priority = 2;
    const AdmissionPlan plan = PlanAdmission(input);
    ASSERT_EQ(plan.admit.size(), 1u);
    if (plan.admit[0] == RequestId{1}) break;
    std::erase_if(input.waiting, [&](const WaitingView& w) { return w.id == plan.admit[0]; });
    for (WaitingView& w : input.waiting) w.waited += absl::Seconds(1);
  }
}

// A heavy tenant's backlog of random sizes: as long as both have work, both are served the same
// number of tokens, up to one request.
TEST(PlanAdmissionTest, ABacklogOfOneTenantDoesNotHoldUpAnother) {
  constexpr uint64_t kSeed = 4;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  AdmissionInput input = RoomFor(100, 1);
  for (uint64_t id = 1; id <= 200; ++id) {
    input.waiting.push_back(Waiting(id, 1 + static_cast<int64_t>(random() % 5000)));
    input.waiting.back().tenant = id <= 190 ? "heavy" : "light";
  }
  for (int light_left = 10; light_left > 0;) {
    const RequestId id = PlanAdmission(input).admit.at(0);
    light_left -= Raw(id) > 190;
    std::erase_if(input.waiting, [&](const WaitingView& w) {
      if (w.id == id) input.tenant_tokens[w.tenant] += static_cast<double>(w.uncached_tokens);
      return w.id == id;
    });
    EXPECT_NEAR(input.tenant_tokens["heavy"], input.tenant_tokens["light"], 5000);
  }
}

TEST(PlanRowsTest, DecodesEverybodyAndFillsUpWithPrefill) {
  const RowInput input{.decode = {{Key(1), 3}, {Key(2), 3}},
                       .prefill = {{.stem = 7, .first_row = 0, .rows = 100}},
                       .max_rows = 64,
                       .block_tokens = 16};
  const RowPlan plan = PlanRows(input);
  EXPECT_THAT(plan.decode, ElementsAre(Key(1), Key(2)));
  ASSERT_EQ(plan.prefill.size(), 1u);
  EXPECT_EQ(plan.prefill[0].rows, 48);  // 62 are left; a chunk ends at a block boundary
}

TEST(PlanRowsTest, ChunksAlignToBlocksOfThePath) {
  const RowInput input{
      .prefill = {{.stem = 7, .first_row = 21, .rows = 100}}, .max_rows = 32, .block_tokens = 16};
  EXPECT_EQ(PlanRows(input).prefill[0].rows, 48 - 21);
}

TEST(PlanRowsTest, PrefillGoesByPriorityThenAge) {
  const RowInput input{.prefill = {{.stem = 2, .rows = 20},
                                   {.stem = 1, .rows = 20},
                                   {.stem = 3, .priority = 1, .rows = 20}},
                       .max_rows = 50,
                       .block_tokens = 4};
  const RowPlan plan = PlanRows(input);
  ASSERT_EQ(plan.prefill.size(), 3u);
  EXPECT_EQ(plan.prefill[0].stem, 3u);
  EXPECT_EQ(plan.prefill[1].stem, 1u);
  EXPECT_EQ(plan.prefill[2].stem, 2u);
  EXPECT_EQ(plan.prefill[2].rows, 8);
}

TEST(PlanRowsTest, TooManySamplesTakeTurnsAndLeaveAQuarterToPrefill) {
  RowInput input{.prefill = {{.stem = 1, .rows = 100}}, .max_rows = 16, .block_tokens = 4};
  for (uint64_t id = 1; id <= 30; ++id) input.decode.push_back({Key(id), 0});
  std::map<SampleKey, int> ran;
  for (uint64_t step = 1; step <= 10; ++step) {
    const RowPlan plan = PlanRows(input);
    EXPECT_EQ(plan.decode.size(), 12u);
    EXPECT_EQ(plan.prefill[0].rows, 4);
    for (const SampleKey& key : plan.decode) {
      ++ran[key];
      for (DecodeView& d : input.decode) {
        if (d.key == key) d.last_step = step;
      }
    }
  }
  EXPECT_EQ(ran.size(), 30u);
  for (const auto& [key, times] : ran) EXPECT_NEAR(times, 4, 1);
}

TEST(PlanRowsTest, NeverExceedsTheRows) {
  constexpr uint64_t kSeed = 9;
  SCOPED_TRACE(kSeed);
  std::mt19937_64 random(kSeed);
  for (int round = 0; round < 300; ++round) {
    RowInput input{.max_rows = 8 + static_cast<int64_t>(random() % 200),
                   .block_tokens = 1 + static_cast<int64_t>(random() % 32)};
    for (uint64_t i = random() % 100; i > 0; --i) input.decode.push_back({Key(i), random() % 5});
    for (uint64_t i = random() % 10; i > 0; --i) {
      input.prefill.push_back({.stem = i,
                               .first_row = static_cast<int64_t>(random() % 100),
                               .rows = 1 + static_cast<int64_t>(random() % 300)});
    }
    const RowPlan plan = PlanRows(input);
    int64_t rows = static_cast<int64_t>(plan.decode.size());
    for (const PrefillRows& p : plan.prefill) {
      EXPECT_GT(p.rows, 0);
      rows += p.rows;
    }
    EXPECT_LE(rows, input.max_rows);
    EXPECT_EQ(plan.empty(), input.decode.empty() && input.prefill.empty());
    EXPECT_TRUE(input.prefill.empty() || !plan.prefill.empty());
  }
}

TEST(TenantMeterTest, AbsenceEarnsNoCredit) {
  TenantMeter meter;
  meter.Enter("a", {});
  meter.Charge("a", 1000);
  meter.Enter("b", {"a"});
  EXPECT_EQ(meter.tokens().at("b"), 1000);
  meter.Charge("b", 500);
  meter.Enter("a", {"b"});
  EXPECT_EQ(meter.tokens().at("a"), 1500);
}

TEST(TenantMeterTest, ForgetsAbsentTenantsWhenTheyAreMany) {
  TenantMeter meter;
  for (int i = 0; i < 5000; ++i) meter.Enter("tenant" + std::to_string(i), {});
  EXPECT_LE(meter.tokens().size(), kMaxAbsentTenants + 1);
}

}  // namespace
}  // namespace coppice
