#include "server/router/routes.h"

#include "absl/strings/str_cat.h"
#include "coppice/v1/admin.pb.h"
#include "coppice/v1/cache.pb.h"
#include "coppice/v1/generation.pb.h"
#include "coppice/v1/training.pb.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/placement/prefix_hash.h"
#include "server/router/message_bytes.h"
#include "server/router/training_routes.h"

namespace coppice {
namespace {

using ::testing::ElementsAre;

template <typename Message>
grpc::ByteBuffer Bytes(const Message& message) {
  grpc::ByteBuffer buffer;
  Serialize(message, buffer);
  return buffer;
}

template <typename Message>
Message Parsed(const grpc::ByteBuffer& buffer) {
  const absl::StatusOr<Message> message = Parse<Message>(buffer);
  EXPECT_TRUE(message.ok()) << message.status();
  return message.value_or(Message());
}

grpc::ByteBuffer Garbage() {
  grpc::Slice slice("\xff\xff\xff not a message");
  return {&slice, 1};
}

TEST(RoutesTest, EveryMethodOfTheApiHasARoute) {
  int methods = 0;
  for (const auto* file :
       {v1::GenerateRequest::descriptor()->file(), v1::TrainStepRequest::descriptor()->file(),
        v1::FlushRequest::descriptor()->file(), v1::PauseRequest::descriptor()->file()}) {
    for (int s = 0; s < file->service_count(); ++s) {
      const auto* service = file->service(s);
      for (int m = 0; m < service->method_count(); ++m, ++methods) {
        const std::string name =
            absl::StrCat("/", service->full_name(), "/", service->method(m)->name());
        EXPECT_NE(RouteOf(name), Route::kUnknown) << name;
        const bool to_all = service->name() == "Cache" || service->name() == "Admin" ||
                            service->method(m)->name() == "Abort";
        EXPECT_EQ(IsFanOut(name), to_all) << name;
        const std::string& method = service->method(m)->name();
        const bool long_work = service->name() == "Training" || method == "Score" ||
                               method == "Pause" || method == "Drain";
        EXPECT_EQ(TakesLong(name), long_work) << name;
      }
    }
  }
  EXPECT_GE(methods, 18);
  EXPECT_EQ(RouteOf("/coppice.v1.Cache/NoSuchMethod"), Route::kUnknown);
  EXPECT_EQ(RouteOf("/grpc.health.v1.Health/Check"), Route::kUnknown);
}

TEST(RoutesTest, AGenerateRequestSaysWhatPlacementNeeds) {
  v1::GenerateRequest request;
  for (int i = 0; i < 600; ++i) request.mutable_prompt()->mutable_tokens()->add_ids(i);
  for (int i = 600; i < 800; ++i) request.mutable_prompt()->mutable_suffix()->add_ids(i);
  request.set_n(4);
  request.mutable_sampling()->set_max_tokens(50);
  request.set_session_id("s");
  const auto facts = ReadPlacementFacts(Route::kGenerate, Bytes(request), "team-a", std::nullopt);
  ASSERT_TRUE(facts.ok());
  EXPECT_EQ(facts->prompt_tokens, 800);
  EXPECT_EQ(facts->blocks.size(), 3u);
  EXPECT_EQ(facts->n, 4);
  EXPECT_EQ(facts->max_tokens, 50);
  EXPECT_NE(facts->session, 0u);
  std::vector<int32_t> ids(800);
  for (int i = 0; i < 800; ++i) ids[i] = i;
  EXPECT_EQ(facts->prefix_hash, PrefixHash({.name_space = "team-a", .token_ids = ids}));

  const auto given = ReadPlacementFacts(Route::kGenerate, Bytes(request), "team-a", 77);
  EXPECT_EQ(given->prefix_hash, 77u);
  request.mutable_cache()->set_key("key");
  const auto keyed = ReadPlacementFacts(Route::kGenerate, Bytes(request), "", std::nullopt);
  EXPECT_EQ(keyed->prefix_hash, PrefixHash({.cache_key = "key"}));
  EXPECT_NE(keyed->session, facts->session) << "another tenant's session of the same name";
}

TEST(RoutesTest, BytesThatAreNoMessageAreTheCallersFault) {
  for (const Route route : {Route::kGenerate, Route::kWarm, Route::kScore}) {
    const auto facts = ReadPlacementFacts(route, Garbage(), "", std::nullopt);
    EXPECT_EQ(facts.status().code(), absl::StatusCode::kInvalidArgument);
  }
  for (const char* method : {"TrainStep", "ForwardBackward", "GetRollout", "PutRollout"}) {
    grpc::ByteBuffer request = Garbage();
    const auto facts = ReadTraining(absl::StrCat("/coppice.v1.Training/", method), "a", request);
    EXPECT_EQ(facts.status().code(), absl::StatusCode::kInvalidArgument) << method;
  }
  EXPECT_FALSE(ReadEvent(Garbage()).started);
  EXPECT_EQ(Merge("/coppice.v1.Cache/Flush", {Garbage()}).status().code(),
            absl::StatusCode::kInternal);
}

TEST(RoutesTest, OnlyFirstAndLastEventsAreRead) {
  v1::GenerateEvent started;
  v1::Usage* usage = started.mutable_started()->mutable_prompt_usage();
  usage->set_prompt_tokens(100);
  usage->set_cached_device_tokens(48);
  usage->set_joined_tokens(16);
  const EventFacts at_start = ReadEvent(Bytes(started));
  EXPECT_TRUE(at_start.started);
  EXPECT_EQ(at_start.prompt_tokens, 100);
  EXPECT_EQ(at_start.hit_tokens, 64);

  v1::GenerateEvent chunk;
  chunk.mutable_chunk()->add_token_ids(1);
  const EventFacts nothing = ReadEvent(Bytes(chunk));
  EXPECT_FALSE(nothing.started || nothing.group);

  v1::GenerateEvent group;
  group.mutable_group()->set_rollout_id("rollout-1");
  group.mutable_group()->mutable_usage()->set_completion_tokens(9);
  const EventFacts at_end = ReadEvent(Bytes(group));
  EXPECT_EQ(at_end.completion_tokens, 9);
  EXPECT_EQ(at_end.rollout_id, "rollout-1");
}

TEST(RoutesTest, TheLastEventGetsWhatTheRouterKnows) {
  v1::GenerateEvent group;
  group.mutable_group()->set_rollout_id("rollout-1");
  group.mutable_group()->set_policy_version(4);
  group.mutable_group()->mutable_usage()->set_completion_tokens(9);
  grpc::ByteBuffer event = Bytes(group);
  AddToGroup("", std::nullopt, event);
  EXPECT_EQ(Parsed<v1::GenerateEvent>(event).SerializeAsString(), group.SerializeAsString());

  AddToGroup("rollout-1@coppice-1",
             Explanation{.replica = "coppice-1",
                         .home = "coppice-2",
                         .by = PlacedBy::kBalance,
                         .prefix_hash = 0xab,
                         .predicted_hit_tokens = 512,
                         .load = 100,
                         .charge = 20.5,
                         .attempts = 2},
             event);
  const v1::GroupFinished got = Parsed<v1::GenerateEvent>(event).group();
  EXPECT_EQ(got.rollout_id(), "rollout-1@coppice-1");
  EXPECT_EQ(got.policy_version(), 4u);
  EXPECT_EQ(got.usage().completion_tokens(), 9);
  EXPECT_EQ(got.placement().replica(), "coppice-1");
  EXPECT_EQ(got.placement().reason(), v1::Placement::BALANCE);
  EXPECT_EQ(got.placement().home(), "coppice-2");
  EXPECT_EQ(got.placement().prefix_hash(), "00000000000000ab");
  EXPECT_EQ(got.placement().predicted_hit_tokens(), 512);
  EXPECT_EQ(got.placement().load(), 100);
  EXPECT_EQ(got.placement().charge(), 20.5);
  EXPECT_EQ(got.placement().attempts(), 2);
}

TEST(RoutesTest, StepsSayWhichRolloutsLieElsewhere) {
  v1::ForwardBackwardRequest request;
  request.add_groups()->set_rollout_id("rollout-1@coppice-0");
  request.add_groups()->mutable_prompt()->add_ids(1);
  request.add_groups()->set_rollout_id("rollout-2");
  for (const char* id : {"rollout-4@coppice-2", "rollout-3@coppice-1", "rollout-4@coppice-2"}) {
    request.add_groups()->set_rollout_id(id);
  }
  grpc::ByteBuffer buffer = Bytes(request);
  const auto facts = ReadTraining("/coppice.v1.Training/ForwardBackward", "coppice-0", buffer);
  ASSERT_TRUE(facts.ok());
  EXPECT_FALSE(facts->changes_policy);
  EXPECT_EQ(facts->replica, "");
  EXPECT_THAT(facts->elsewhere, ElementsAre(RolloutName{"rollout-3", "coppice-1"},
                                            RolloutName{"rollout-4", "coppice-2"}));
  const auto resolved = Parsed<v1::ForwardBackwardRequest>(buffer);
  EXPECT_EQ(resolved.groups(0).rollout_id(), "rollout-1");
  EXPECT_EQ(resolved.groups(1).prompt().ids(0), 1);
  EXPECT_EQ(resolved.groups(2).rollout_id(), "rollout-2");
  EXPECT_EQ(resolved.groups(3).rollout_id(), "rollout-4@coppice-2");
}

TEST(RoutesTest, ARolloutIsAskedForAtItsHomeAndPutWithTheLeader) {
  const auto read = [](const char* method, auto& request) {
    grpc::ByteBuffer buffer = Bytes(request);
    const auto facts = ReadTraining(method, "coppice-0", buffer);
    EXPECT_TRUE(facts.ok() && facts->elsewhere.empty() && !facts->changes_policy);
    request = Parsed<std::decay_t<decltype(request)>>(buffer);
    return facts->replica;
  };
  v1::GetRolloutRequest get;
  get.set_rollout_id("rollout-4@coppice-2");
  EXPECT_EQ(read(kGetRolloutMethod, get), "coppice-2");
  EXPECT_EQ(get.rollout_id(), "rollout-4");
  EXPECT_EQ(read(kGetRolloutMethod, get), "");
  v1::PutRolloutRequest put;
  put.set_rollout_id("rollout-4@coppice-2");
  EXPECT_EQ(read(kPutRolloutMethod, put), "");
  EXPECT_EQ(put.rollout_id(), "rollout-4@coppice-2");
  put.set_rollout_id("mine@coppice-0");
  EXPECT_EQ(read(kPutRolloutMethod, put), "");
  EXPECT_EQ(put.rollout_id(), "mine");

  for (const char* method : {"TrainStep", "OptimStep", "LoadCheckpoint"}) {
    grpc::ByteBuffer empty = Bytes(v1::TrainStepRequest());
    const auto facts = ReadTraining(absl::StrCat("/coppice.v1.Training/", method), "a", empty);
    EXPECT_TRUE(facts.ok() && facts->changes_policy) << method;
  }
}

TEST(RoutesTest, AnAnswerOfTheHomeIsARequestToTheLeader) {
  const RolloutName name{"rollout-4", "coppice-2"};
  EXPECT_EQ(Parsed<v1::GetRolloutRequest>(GetRolloutRequestFor(name)).rollout_id(), "rollout-4");
  v1::GetRolloutResponse answer;
  answer.mutable_rollout()->mutable_prompt()->add_ids(3);
  answer.mutable_rollout()->set_temperature(0.5f);
  const auto put = Parsed<v1::PutRolloutRequest>(PutRolloutRequestFor(name, Bytes(answer)));
  EXPECT_EQ(put.rollout_id(), "rollout-4@coppice-2");
  EXPECT_EQ(put.rollout().SerializeAsString(), answer.rollout().SerializeAsString());
}

TEST(RoutesTest, MergedAnswersAddCountsAndKeepTheLeadersRest) {
  v1::GetStatusResponse leader, other;
  leader.set_policy_version(5);
  leader.set_state(v1::SERVING_STATE_PAUSED);
  leader.set_running_requests(2);
  leader.mutable_cache()->set_hit_tokens(10);
  other.set_policy_version(4);
  other.set_state(v1::SERVING_STATE_SERVING);
  other.set_running_requests(3);
  other.mutable_cache()->set_hit_tokens(7);
  const auto merged = Merge("/coppice.v1.Admin/GetStatus", {Bytes(leader), Bytes(other)});
  ASSERT_TRUE(merged.ok());
  const auto status = Parsed<v1::GetStatusResponse>(*merged);
  EXPECT_EQ(status.policy_version(), 5u);
  EXPECT_EQ(status.state(), v1::SERVING_STATE_SERVING);
  EXPECT_EQ(status.running_requests(), 5);
  EXPECT_EQ(status.cache().hit_tokens(), 17);
}

}  // namespace
}  // namespace coppice
