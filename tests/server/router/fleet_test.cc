#include "server/router/fleet.h"

#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/placement/prefix_hash.h"
#include "tests/support/fake_clock.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Nothing listens there; no test sends anything.
std::vector<ReplicaAddress> Addresses(int count) {
  std::vector<ReplicaAddress> addresses;
  for (int i = 0; i < count; ++i) {
    addresses.push_back({absl::StrCat("coppice-", i), "localhost:1"});
  }
  return addresses;
}

ReplicaReport Serving(const std::string& model = "m", uint64_t version = 0) {
  return {.health = ReplicaReport::Health::kServing,
          .facts = ReplicaReport::Facts{
              .model = model, .policy_version = version, .cache_tokens = 1 << 20}};
}

class FleetTest : public ::testing::Test {
 protected:
  void Start(int replicas) {
    fleet_.SetMembers(Addresses(replicas));
    for (const ReplicaTarget& member : fleet_.Members()) {
      ids_.push_back(member.id);
      fleet_.Update(member.id, Serving());
    }
  }
  absl::StatusOr<Fleet::Choice> Place(uint64_t key = 1) {
    return fleet_.Place({.prefix_hash = key, .prompt_tokens = 10, .max_tokens = 10});
  }
  absl::StatusOr<Fleet::Choice> PlaceRetained(uint64_t key = 1) {
    return fleet_.PlaceRetained({.prefix_hash = key, .prompt_tokens = 10, .max_tokens = 10});
  }
  // Who takes retained groups.
  std::set<std::string> Takers() {
    std::set<std::string> takers;
    for (uint64_t key = 0; key < 100; ++key) {
      const auto choice = PlaceRetained(MixHash(key, 1));
      if (!choice.ok()) continue;
      takers.insert(choice->target.name);
      fleet_.Finish(choice->placed, -1);
    }
    return takers;
  }
  void Report(int replica, uint64_t version) {
    ReplicaReport report = Serving("m", version);
    report.policy_epoch = fleet_.policy_epoch();
    fleet_.Update(ids_[replica], report);
  }

  RouterMetrics metrics_;
  FakeClock clock_;
  Fleet fleet_{{.eject_after = 2, .first_byte_timeout = absl::Seconds(10)}, metrics_, clock_};
  std::vector<ReplicaId> ids_;
};

TEST_F(FleetTest, AReplicaServesOnceItsModelIsKnown) {
  EXPECT_FALSE(Place().ok());
  fleet_.SetMembers(Addresses(1));
  const ReplicaId id = fleet_.Members()[0].id;
  fleet_.Update(id, {.health = ReplicaReport::Health::kServing});
  EXPECT_THAT(std::string(Place().status().message()), HasSubstr("coppice-0 joining"));
  fleet_.Update(id, Serving());
  EXPECT_TRUE(Place().ok());
  EXPECT_EQ(metrics_.replicas_serving.Value(), 1);
}

TEST_F(FleetTest, FailuresInARowEjectAndCancel) {
  Start(2);
  const auto attempt = std::make_shared<OpenAttempt>();
  fleet_.Opened(ids_[0], attempt);
  fleet_.Update(ids_[0], {});
  fleet_.Update(ids_[0], Serving());
  fleet_.Update(ids_[0], {});
  EXPECT_EQ(fleet_.num_serving(), 2) << "not in a row";
  fleet_.Update(ids_[0], {});
  EXPECT_EQ(fleet_.num_serving(), 1);
  EXPECT_EQ(attempt->cancelled, OpenAttempt::Cancelled::kEjected);
  EXPECT_EQ(metrics_.ejections_health.Value(), 1);
  for (uint64_t key = 0; key < 20; ++key) EXPECT_EQ(Place(key)->target.id, ids_[1]);
  fleet_.Update(ids_[0], Serving());
  EXPECT_EQ(fleet_.num_serving(), 2);
}

TEST_F(FleetTest, ADrainingReplicaKeepsItsCalls) {
  Start(2);
  const auto attempt = std::make_shared<OpenAttempt>();
  fleet_.Opened(ids_[1], attempt);
  fleet_.Update(ids_[1], {.health = ReplicaReport::Health::kNotServing});
  EXPECT_EQ(fleet_.num_serving(), 1);
  EXPECT_EQ(attempt->cancelled, OpenAttempt::Cancelled::kNo);
  EXPECT_EQ(fleet_.Reachable().size(), 2u);
}

TEST_F(FleetTest, PausedReplicasTakeCallsIfNoneServes) {
  Start(2);
  const ReplicaReport paused = {.health = ReplicaReport::Health::kNotServing};
  fleet_.Update(ids_[0], paused);
  for (uint64_t key = 0; key < 20; ++key) EXPECT_EQ(Place(key)->target.id, ids_[1]);
  EXPECT_EQ(fleet_.Any({})->id, ids_[1]);
  fleet_.Update(ids_[1], paused);
  EXPECT_EQ(fleet_.num_serving(), 0);
  ASSERT_TRUE(Place().ok());
  EXPECT_TRUE(fleet_.Any({}).ok());
  EXPECT_TRUE(PlaceRetained().ok());

  const auto waiting = std::make_shared<OpenAttempt>();
  fleet_.Opened(ids_[0], waiting);
  clock_.Advance(absl::Hours(1));
  fleet_.CancelLate();
  EXPECT_EQ(waiting->cancelled, OpenAttempt::Cancelled::kNo) << "the pause may last";
  clock_.Advance(absl::Seconds(9));
  fleet_.Update(ids_[0], Serving());
  fleet_.CancelLate();
  EXPECT_EQ(waiting->cancelled, OpenAttempt::Cancelled::kNo);

  ReplicaReport draining = Serving();
  draining.health = ReplicaReport::Health::kNotServing;
  draining.facts->draining = true;
  for (const ReplicaId id : ids_) fleet_.Update(id, draining);
  EXPECT_THAT(std::string(Place().status().message()), HasSubstr("coppice-0 not_ready"));
  EXPECT_TRUE(fleet_.AnyReachable());
}

TEST_F(FleetTest, ALateFirstByteEjectsAnEngineThatDoesNotAnswer) {
  Start(2);
  const auto late = std::make_shared<OpenAttempt>(), begun = std::make_shared<OpenAttempt>();
  fleet_.Opened(ids_[0], late);
  fleet_.Opened(ids_[0], begun);
  begun->first_byte = true;
  clock_.Advance(absl::Seconds(9));
  fleet_.CancelLate();
  EXPECT_EQ(late->cancelled, OpenAttempt::Cancelled::kNo);
  clock_.Advance(absl::Seconds(2));
  fleet_.CancelLate();
  EXPECT_EQ(late->cancelled, OpenAttempt::Cancelled::kFirstByteLate);
  EXPECT_EQ(begun->cancelled, OpenAttempt::Cancelled::kNo);
  // gRPC's threads answer, the engine does not.
  fleet_.Update(ids_[0], {.health = ReplicaReport::Health::kServing});
  EXPECT_EQ(fleet_.num_serving(), 1);
  EXPECT_EQ(metrics_.ejections_first_byte.Value(), 1);
  fleet_.Update(ids_[0], Serving());
  EXPECT_EQ(fleet_.num_serving(), 2);
}

TEST_F(FleetTest, ATrainingStepMayTakeAnyTime) {
  Start(2);
  const auto step = std::make_shared<OpenAttempt>(), waiting = std::make_shared<OpenAttempt>();
  step->takes_long = true;
  fleet_.Opened(ids_[0], step);
  fleet_.Opened(ids_[0], waiting);
  clock_.Advance(absl::Hours(1));
  fleet_.CancelLate();
  EXPECT_EQ(step->cancelled, OpenAttempt::Cancelled::kNo);
  EXPECT_EQ(waiting->cancelled, OpenAttempt::Cancelled::kFirstByteLate);
  // The step holds the engine; gRPC's threads answer.
  fleet_.Update(ids_[0], {.health = ReplicaReport::Health::kServing});
  EXPECT_EQ(fleet_.num_serving(), 2);
  for (int i = 0; i < 2; ++i) fleet_.Update(ids_[0], {});
  EXPECT_EQ(step->cancelled, OpenAttempt::Cancelled::kEjected);
  EXPECT_EQ(metrics_.ejections_health.Value(), 1);
}

TEST_F(FleetTest, ACallThatOpensAfterTheEjectionIsCancelled) {
  Start(1);
  for (int i = 0; i < 2; ++i) fleet_.Update(ids_[0], {});
  const auto attempt = std::make_shared<OpenAttempt>();
  fleet_.Opened(ids_[0], attempt);
  EXPECT_EQ(attempt->cancelled, OpenAttempt::Cancelled::kEjected);
}

TEST_F(FleetTest, AReplicaThatNeverServedIsNoEjection) {
  fleet_.SetMembers(Addresses(1));
  for (int i = 0; i < 2; ++i) fleet_.Update(fleet_.Members()[0].id, {});
  EXPECT_EQ(metrics_.replicas_ejected.Value(), 1);
  EXPECT_EQ(metrics_.ejections_health.Value(), 0);
}

TEST_F(FleetTest, TheLeaderIsFirstByNameAndNeverReplaced) {
  Start(3);
  EXPECT_EQ(fleet_.Leader()->name, "coppice-0");
  auto without = Addresses(3);
  without.erase(without.begin());
  fleet_.SetMembers(without);
  EXPECT_THAT(std::string(fleet_.Leader().status().message()),
              HasSubstr("want coppice-0 serving, got no such replica"));
  EXPECT_FALSE(PlaceRetained().ok()) << "whose policy they have is not known";
  EXPECT_EQ(fleet_.num_serving(), 2);
}

TEST_F(FleetTest, ASmallerNameThatComesLaterDoesNotLead) {
  auto later = Addresses(3);
  fleet_.SetMembers({later[1], later[2]});
  EXPECT_EQ(fleet_.leader_name(), "coppice-1");
  fleet_.SetMembers(later);
  EXPECT_EQ(fleet_.leader_name(), "coppice-1");

  Fleet named({.leader = "coppice-0"}, metrics_, clock_);
  named.SetMembers({later[1], later[2]});
  EXPECT_EQ(named.leader_name(), "coppice-0");
}

TEST_F(FleetTest, DifferencesFromTheLeaderAreCountedAndOtherModelsGetNothing) {
  Start(3);
  fleet_.Update(ids_[0], Serving("m", 4));
  EXPECT_EQ(metrics_.policy_mismatches.Value(), 2);
  EXPECT_EQ(fleet_.num_serving(), 3);
  EXPECT_TRUE(fleet_.CheckModels().ok());
  fleet_.Update(ids_[1], Serving("other", 4));
  EXPECT_EQ(metrics_.model_mismatches.Value(), 1);
  EXPECT_EQ(metrics_.policy_mismatches.Value(), 1);
  EXPECT_EQ(fleet_.num_serving(), 2);
  EXPECT_THAT(std::string(fleet_.CheckModels().message()), HasSubstr("want one model, got m on"));
}

TEST_F(FleetTest, RetainedGroupsGoWhereTheLeadersPolicyIs) {
  Start(3);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0", "coppice-1", "coppice-2"));
  Report(0, 1);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0"));
  Report(2, 1);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0", "coppice-2"));
  const ReplicaId two[] = {ids_[0], ids_[2]};
  EXPECT_FALSE(fleet_.PlaceRetained({.prefix_hash = 1, .max_tokens = 1, .except = two}).ok());
  for (int i = 0; i < 2; ++i) fleet_.Update(ids_[0], {});
  EXPECT_THAT(Takers(), ElementsAre("coppice-2")) << "the leader is away, its policy is known";
}

TEST_F(FleetTest, WhileThePolicyMayChangeOnlyTheLeaderHasIt) {
  Start(2);
  fleet_.PolicyCallBegan();
  EXPECT_THAT(Takers(), ElementsAre("coppice-0"));
  Report(0, 0);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0")) << "the step is not over";
  ReplicaReport early = Serving();
  early.policy_epoch = fleet_.policy_epoch();
  fleet_.PolicyCallEnded();
  EXPECT_THAT(Takers(), ElementsAre("coppice-0"));
  fleet_.Update(ids_[0], early);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0")) << "it was asked before the step was over";
  Report(1, 0);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0")) << "not the leader's answer";
  Report(0, 0);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0", "coppice-1")) << "the step was refused";
  fleet_.PolicyCallBegan();
  fleet_.PolicyCallEnded();
  Report(0, 1);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0"));
  Report(1, 1);
  EXPECT_THAT(Takers(), ElementsAre("coppice-0", "coppice-1")) << "it has loaded the checkpoint";
}

TEST_F(FleetTest, AReplicaIsFoundByNameIfItAnswers) {
  Start(2);
  EXPECT_EQ(fleet_.Named("coppice-1")->id, ids_[1]);
  EXPECT_THAT(std::string(fleet_.Named("coppice-7").status().message()),
              HasSubstr("want coppice-7 answering health checks, got no such replica"));
  for (int i = 0; i < 2; ++i) fleet_.Update(ids_[1], {});
  EXPECT_EQ(fleet_.Named("coppice-1").status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(FleetTest, AReplicaWithAnotherAddressKeepsItsKeys) {
  Start(4);
  std::vector<std::string> before;
  for (uint64_t key = 0; key < 50; ++key) before.push_back(Place(key * 7919)->home);
  auto moved = Addresses(4);
  moved[2].target = "localhost:2";
  fleet_.SetMembers(moved);
  for (const ReplicaTarget& member : fleet_.Members()) fleet_.Update(member.id, Serving());
  for (uint64_t key = 0; key < 50; ++key) EXPECT_EQ(Place(key * 7919)->home, before[key]);
}

TEST(ReplicaAddressTest, ListsAreNamesAndAddresses) {
  const auto named = ParseReplicas("b=host-b:2,a=host-a:1");
  ASSERT_TRUE(named.ok());
  EXPECT_EQ((*named)[0], (ReplicaAddress{"a", "host-a:1"}));
  EXPECT_EQ((*ParseReplicas("host:7700"))[0].name, "host:7700");
  for (const char* bad : {"", "host", "host:0", "host:99999", "=host:1", "a=h:1,a=h:2", "h:1,,h:2",
                          "a@b=h:1", ":1"}) {
    EXPECT_EQ(ParseReplicas(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

TEST(ReplicaAddressTest, AnAddressWithoutANameWaitsUnlessNoneHasOne) {
  using Replicas = std::vector<ReplicaAddress>;
  EXPECT_EQ(NameReplicas({{"b", "2:1"}, {"", "1:1"}, {"a", "3:1"}}),
            (Replicas{{"a", "3:1"}, {"b", "2:1"}}));
  const Replicas by_address = {{"1:1", "1:1"}, {"2:1", "2:1"}};
  EXPECT_EQ(NameReplicas({{"", "2:1"}, {"", "1:1"}}), by_address);
  EXPECT_EQ(NameReplicas({{"a", "2:1"}, {"a", "1:1"}}), by_address) << "not unique";
}

TEST(ReplicaAddressTest, NamesResolveOrSayWhyNot) {
  const auto found = ResolveReplicas("localhost:7700");
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_THAT((*found)[0].target, HasSubstr(":7700"));
  EXPECT_EQ(ResolveReplicas("no-such-host.invalid:1").status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(ResolveReplicas("no-port").status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace coppice
