#include "server/router/routes.h"

#include "absl/strings/str_cat.h"
#include "coppice/v1/admin.pb.h"
#include "coppice/v1/cache.pb.h"
#include "coppice/v1/generation.pb.h"
#include "coppice/v1/training.pb.h"
#include "gmock/gmock.h"
#include "grpcpp/impl/codegen/proto_utils.h"
#include "gtest/gtest.h"
#include "server/placement/prefix_hash.h"

namespace coppice {
namespace {

using ::testing::HasSubstr;

template <typename Message>
grpc::ByteBuffer Bytes(const Message& message) {
  grpc::ByteBuffer buffer;
  bool own = false;
  grpc::SerializationTraits<Message>::Serialize(message, &buffer, &own);
  return buffer;
}

template <typename Message>
Message Parse(grpc::ByteBuffer buffer) {
  Message message;
  EXPECT_TRUE(grpc::SerializationTraits<Message>::Deserialize(&buffer, &message).ok());
  return message;
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
  grpc::ByteBuffer step = Garbage();
  EXPECT_EQ(ResolveRollouts("/coppice.v1.Training/TrainStep", "a", step).code(),
            absl::StatusCode::kInvalidArgument);
  grpc::ByteBuffer event = Garbage();
  EXPECT_FALSE(ReadEvent("a", event).started);
  EXPECT_EQ(Merge("/coppice.v1.Cache/Flush", {Garbage()}).status().code(),
            absl::StatusCode::kInternal);
}

TEST(RoutesTest, OnlyFirstAndLastEventsAreRead) {
  v1::GenerateEvent started;
  v1::Usage* usage = started.mutable_started()->mutable_prompt_usage();
  usage->set_prompt_tokens(100);
  usage->set_cached_device_tokens(48);
  usage->set_joined_tokens(16);
  grpc::ByteBuffer first = Bytes(started);
  const EventFacts at_start = ReadEvent("coppice-1", first);
  EXPECT_TRUE(at_start.started);
  EXPECT_EQ(at_start.prompt_tokens, 100);
  EXPECT_EQ(at_start.hit_tokens, 64);

  v1::GenerateEvent chunk;
  chunk.mutable_chunk()->add_token_ids(1);
  grpc::ByteBuffer middle = Bytes(chunk);
  const EventFacts nothing = ReadEvent("coppice-1", middle);
  EXPECT_FALSE(nothing.started || nothing.group);

  v1::GenerateEvent group;
  group.mutable_group()->set_rollout_id("rollout-1");
  group.mutable_group()->mutable_usage()->set_completion_tokens(9);
  grpc::ByteBuffer last = Bytes(group);
  const EventFacts at_end = ReadEvent("coppice-1", last);
  EXPECT_EQ(at_end.completion_tokens, 9);
  EXPECT_EQ(Parse<v1::GenerateEvent>(last).group().rollout_id(), "rollout-1@coppice-1");
}

TEST(RoutesTest, RolloutsLoseTheLeadersNameAndNoOther) {
  constexpr char kMethod[] = "/coppice.v1.Training/ForwardBackward";
  v1::ForwardBackwardRequest request;
  request.add_groups()->set_rollout_id("rollout-1@coppice-0");
  request.add_groups()->mutable_prompt()->add_ids(1);
  request.add_groups()->set_rollout_id("rollout-2");
  grpc::ByteBuffer buffer = Bytes(request);
  ASSERT_TRUE(ResolveRollouts(kMethod, "coppice-0", buffer).ok());
  const auto resolved = Parse<v1::ForwardBackwardRequest>(buffer);
  EXPECT_EQ(resolved.groups(0).rollout_id(), "rollout-1");
  EXPECT_EQ(resolved.groups(1).prompt().ids(0), 1);
  EXPECT_EQ(resolved.groups(2).rollout_id(), "rollout-2");
  buffer = Bytes(request);
  const absl::Status other = ResolveRollouts(kMethod, "coppice-2", buffer);
  EXPECT_EQ(other.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(other.message()), HasSubstr("of the leader coppice-2"));
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
  const auto status = Parse<v1::GetStatusResponse>(*merged);
  EXPECT_EQ(status.policy_version(), 5u);
  EXPECT_EQ(status.state(), v1::SERVING_STATE_SERVING);
  EXPECT_EQ(status.running_requests(), 5);
  EXPECT_EQ(status.cache().hit_tokens(), 17);
}

}  // namespace
}  // namespace coppice
