// The router over real daemons and sockets: replicas that die, hang, return and restart; readers
// that are slow; configurations that are wrong.
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "coppice/v1/admin.grpc.pb.h"
#include "coppice/v1/cache.grpc.pb.h"
#include "coppice/v1/generation.grpc.pb.h"
#include "coppice/v1/training.grpc.pb.h"
#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "gtest/gtest.h"
#include "httplib.h"
#include "tests/support/daemon_process.h"
#include "tests/support/raw_call.h"

namespace coppice {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int kKeys = 100;
// For what must happen, on a machine that is busy.
constexpr absl::Duration kDeadline = absl::Seconds(60);

std::string Name(int replica) { return absl::StrCat("coppice-", replica); }

class RouterTest : public ::testing::Test {
 protected:
  // What is frozen is ejected soon; or a busy machine ejects nobody, only a refused connection
  // does.
  static constexpr char kBrief[] = "--health_timeout_ms=1000";
  static constexpr char kPatient[] = "--health_timeout_ms=60000";

  static std::unique_ptr<DaemonProcess> Run(std::vector<std::string> args) {
    return std::make_unique<DaemonProcess>(COPPICED_BINARY, std::move(args));
  }
  static std::unique_ptr<DaemonProcess> Replica(int port, const std::string& model = "tiny-llama") {
    auto replica =
        Run({"--model_geometry=" + model, "--seed=7", "--threads=1", absl::StrCat("--port=", port),
             "--http_port=0", "--checkpoint_dir=" + CheckpointDir()});
    EXPECT_TRUE(replica->AwaitReady()) << replica->log();
    return replica;
  }

  // Of all replicas, as a shared volume would be.
  static std::string CheckpointDir() {
    return absl::StrCat(::testing::TempDir(), "/router_test-", getpid());
  }
  void TearDown() override { std::filesystem::remove_all(CheckpointDir()); }

  // Fills replicas_ and starts the router over them.
  void Start(int replicas, const std::string& health_timeout = kBrief) {
    for (int i = 0; i < replicas; ++i) {
      replicas_.push_back(Replica(0));
      ports_.push_back(replicas_[i]->grpc_port());
    }
    StartRouter(health_timeout);
  }
  void StartRouter(const std::string& health_timeout = kBrief) {
    std::vector<std::string> list;
    for (size_t i = 0; i < ports_.size(); ++i) {
      list.push_back(absl::StrCat(Name(static_cast<int>(i)), "=127.0.0.1:", ports_[i]));
    }
    router_ = Run({"--role=router", "--port=0", "--http_port=0", "--health_interval_ms=100",
                   "--eject_after=2", health_timeout, "--replicas=" + absl::StrJoin(list, ",")});
    ASSERT_TRUE(router_->AwaitReady()) << router_->log();
    // Ready means that it listens; on a busy machine its replicas join later, some as restored.
    for (int i = 0; i < static_cast<int>(ports_.size()); ++i) {
      const std::string suffix = absl::StrCat(" replica=", Name(i), " was=");
      const std::string read = router_->lines_read();
      const bool serves = absl::StrContains(read, "replica_joined" + suffix) ||
                          absl::StrContains(read, "replica_restored" + suffix);
      if (!serves) AwaitServing(i);
    }
    channel_ = Channel(router_->grpc_port());
    generation_ = v1::Generation::NewStub(channel_);
    training_ = v1::Training::NewStub(channel_);
  }
  static std::shared_ptr<grpc::Channel> Channel(int port) {
    grpc::ChannelArguments args;  // the client itself buffers a few kB only
    args.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
    args.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 8192);
    return grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", port),
                                     grpc::InsecureChannelCredentials(), args);
  }
  // Until the router says so.
  void AwaitServing(int replica) {
    std::string line = router_->AwaitLine(absl::StrCat(" replica=", Name(replica), " was="));
    while (line.find("replica_joined") == std::string::npos &&
           line.find("replica_restored") == std::string::npos) {
      ASSERT_FALSE(line.empty()) << router_->log();
      line = router_->AwaitLine(absl::StrCat(" replica=", Name(replica), " was="));
    }
  }
  void Restart(int replica) { replicas_[replica] = Replica(ports_[replica]); }

  static v1::GenerateRequest Request(const std::string& key, int max_tokens, int n = 1) {
    v1::GenerateRequest request;
    for (int id = 1; id <= 20; ++id) request.mutable_prompt()->mutable_tokens()->add_ids(id);
    request.mutable_sampling()->set_max_tokens(max_tokens);
    request.mutable_sampling()->set_seed(3);
    request.mutable_sampling()->set_ignore_eos(true);
    request.mutable_cache()->set_key(key);
    request.set_n(n);
    return request;
  }

  struct Stream {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::GenerateEvent>> reader;
    int64_t tokens = 0;
    v1::GroupFinished group;  // once finished

    bool Read() {
      v1::GenerateEvent event;
      if (!reader->Read(&event)) return false;
      tokens += event.chunk().token_ids_size();
      if (event.has_group()) group = event.group();
      return true;
    }
    grpc::Status Finish() {
      while (Read()) {
      }
      return reader->Finish();
    }
    const std::string& replica() const { return group.placement().replica(); }
  };
  std::unique_ptr<Stream> Open(v1::GenerateRequest request) {
    auto stream = std::make_unique<Stream>();
    request.set_explain_placement(true);
    stream->reader = generation_->Generate(&stream->context, request);
    return stream;
  }
  // Who answers for each key.
  std::map<std::string, std::string> Owners() {
    std::map<std::string, std::string> owners;
    for (int i = 0; i < kKeys; ++i) {
      const std::string key = absl::StrCat("key-", i);
      auto stream = Open(Request(key, 1));
      const grpc::Status status = stream->Finish();
      EXPECT_TRUE(status.ok()) << status.error_message();
      owners[key] = stream->replica();
    }
    return owners;
  }
  static std::string KeyOf(const std::map<std::string, std::string>& owners,
                           const std::string& replica) {
    for (const auto& [key, owner] : owners) {
      if (owner == replica) return key;
    }
    ADD_FAILURE() << "no key lives on " << replica;
    return "";
  }

  static double Metric(const DaemonProcess& process, const std::string& series) {
    const auto response = httplib::Client("127.0.0.1", process.http_port()).Get("/metrics");
    if (!response) return -1;
    const size_t at = response->body.find("\n" + series + " ");
    return at == std::string::npos ? -1
                                   : std::atof(response->body.c_str() + at + series.size() + 2);
  }

  std::vector<std::unique_ptr<DaemonProcess>> replicas_;
  std::vector<int> ports_;
  std::unique_ptr<DaemonProcess> router_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::Generation::Stub> generation_;
  std::unique_ptr<v1::Training::Stub> training_;
};

TEST_F(RouterTest, AKilledReplicaCostsItsOwnStreamsAndAQuarterOfTheKeys) {
  Start(4, kPatient);
  const auto before = Owners();
  std::vector<std::unique_ptr<Stream>> streams;
  for (int i = 0; i < 4; ++i) streams.push_back(Open(Request(KeyOf(before, Name(i)), 1500)));
  for (const auto& stream : streams) ASSERT_TRUE(stream->Read());

  replicas_[2]->Signal(SIGKILL);
  replicas_[2]->Wait();

  for (int i = 0; i < 4; ++i) {
    const grpc::Status status = streams[i]->Finish();
    if (i == 2) {
      EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
      EXPECT_THAT(status.error_message(), HasSubstr("replica " + Name(2)));
      EXPECT_LT(streams[i]->tokens, 1500);
    } else {
      EXPECT_TRUE(status.ok()) << status.error_message();
      EXPECT_EQ(streams[i]->tokens, 1500);
    }
  }
  int moved = 0;
  const auto without = Owners();
  for (const auto& [key, owner] : before) {
    EXPECT_TRUE(owner == Name(2) ? without.at(key) != owner : without.at(key) == owner) << key;
    moved += owner == Name(2);
  }
  EXPECT_GE(moved, 0.20 * kKeys);
  EXPECT_LE(moved, 0.30 * kKeys);

  Restart(2);
  AwaitServing(2);
  EXPECT_EQ(Owners(), before) << "it takes its keys back, and nothing else moves";
}

TEST_F(RouterTest, AHangingReplicaIsEjectedAndReturns) {
  Start(3);
  const auto before = Owners();
  const std::string key = KeyOf(before, Name(1));
  auto begun = Open(Request(key, 3000));
  ASSERT_TRUE(begun->Read());

  replicas_[1]->Freeze();
  auto waiting = Open(Request(key, 8));  // reaches a process that does not answer
  grpc::ClientContext context;           // without a deadline, to all
  v1::GetStatsResponse stats;
  const grpc::Status all = v1::Cache::NewStub(channel_)->GetStats(&context, {}, &stats);
  EXPECT_EQ(all.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(all.error_message(), HasSubstr("want an answer of replica coppice-1, got no answer"));
  ASSERT_THAT(router_->AwaitLine("replica_ejected"), HasSubstr("replica=coppice-1"));

  const grpc::Status moved = waiting->Finish();
  EXPECT_TRUE(moved.ok()) << moved.error_message();
  EXPECT_EQ(waiting->tokens, 8);
  EXPECT_NE(waiting->replica(), Name(1));
  EXPECT_EQ(begun->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_GE(Metric(*router_, "coppice_router_ejections_total{reason=\"health\"}"), 1);
  EXPECT_EQ(Metric(*router_, "coppice_router_replica_up{replica=\"coppice-1\"}"), 0);

  replicas_[1]->Signal(SIGCONT);
  AwaitServing(1);
  EXPECT_EQ(Owners(), before);
}

TEST_F(RouterTest, ARollingRestartUnderLoadFailsNothing) {
  Start(3);
  std::atomic<bool> stop{false};
  std::atomic<int64_t> done{0};
  std::vector<std::string> errors[4];
  std::vector<std::thread> load;
  for (int t = 0; t < 4; ++t) {
    load.emplace_back([&, t] {
      for (int i = 0; !stop; ++i) {
        auto stream = Open(Request(absl::StrCat("load-", t, "-", i % 16), 20));
        const grpc::Status status = stream->Finish();
        if (!status.ok()) errors[t].push_back(status.error_message());
        if (stream->tokens != 20) errors[t].push_back("tokens are missing");
        ++done;
      }
    });
  }
  for (int i = 0; i < 3; ++i) {
    const int64_t so_far = done;
    while (done < so_far + 20) std::this_thread::yield();
    replicas_[i]->Signal(SIGTERM);
    EXPECT_EQ(replicas_[i]->Wait(), 0);
    Restart(i);
    AwaitServing(i);
  }
  stop = true;
  for (std::thread& thread : load) thread.join();
  for (const auto& list : errors) EXPECT_THAT(list, IsEmpty());
}

TEST_F(RouterTest, SlowReadersHoldLittleMemory) {
  Start(1);
  constexpr int kStreams = 8, kSamples = 16, kTokens = 3000;
  EXPECT_TRUE(Open(Request("first", 1))->Finish().ok());
  const int64_t before = router_->ResidentBytes();
  std::vector<std::unique_ptr<Stream>> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.push_back(Open(Request(absl::StrCat(i), kTokens, kSamples)));
    ASSERT_TRUE(streams.back()->Read());
  }
  // Until nothing is generated any more: every stream is full.
  const absl::Time deadline = absl::Now() + kDeadline;
  const std::string generated = "coppice_generation_tokens_total";
  double last = -1;
  for (int same = 0; same < 200 && absl::Now() < deadline;) {
    const double now = Metric(*replicas_[0], generated);
    same = now == last ? same + 1 : 0;
    last = now;
  }
  EXPECT_LT(last, kStreams * kSamples * kTokens / 2) << "readers were not slow";
  const int64_t grown = router_->ResidentBytes() - before;
  RecordProperty("grown_bytes", static_cast<int>(grown));
  EXPECT_LT(grown, kStreams * (int64_t{512} << 10));

  const auto held = static_cast<int64_t>(last) / kStreams;
  for (const auto& stream : streams) {  // what was held back arrives, and more
    while (stream->tokens < held + 100) ASSERT_TRUE(stream->Read());
    stream->context.TryCancel();
  }
}

TEST_F(RouterTest, ACancelledCallEndsOnItsReplica) {
  Start(2);
  auto stream = Open(Request("key", 4000));
  ASSERT_TRUE(stream->Read());
  stream->context.TryCancel();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  const auto admin = v1::Admin::NewStub(channel_);
  v1::GetStatusResponse status;
  const absl::Time deadline = absl::Now() + kDeadline;
  do {
    grpc::ClientContext context;
    ASSERT_TRUE(admin->GetStatus(&context, {}, &status).ok());
  } while (status.running_requests() > 0 && absl::Now() < deadline);
  EXPECT_EQ(status.running_requests(), 0);
}

// Retained groups through the router, and steps on them.
class RouterTrainingTest : public RouterTest {
 protected:
  // A retained group of two samples: the name of its rollout.
  std::string Retain(const std::string& key) {
    v1::GenerateRequest request = Request(key, 6, /*n=*/2);
    request.set_retain(true);
    auto stream = Open(request);
    const grpc::Status status = stream->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_THAT(stream->group.rollout_id(), EndsWith("@" + stream->replica()));
    return stream->group.rollout_id();
  }
  static std::string HomeOf(const std::string& rollout) {
    return rollout.substr(rollout.rfind('@') + 1);
  }
  // A group of each replica, and its key.
  std::map<std::string, std::string> RetainOnAll(int replicas) {
    std::map<std::string, std::string> keys;  // by replica
    for (int i = 0; static_cast<int>(keys.size()) < replicas && i < kKeys; ++i) {
      const std::string key = absl::StrCat("key-", i);
      const std::string rollout = Retain(key);
      if (keys.emplace(HomeOf(rollout), key).second) rollouts_.push_back(rollout);
    }
    EXPECT_EQ(static_cast<int>(keys.size()), replicas) << "groups are not spread";
    return keys;
  }
  std::string RolloutOf(const std::string& replica) {
    for (const std::string& rollout : rollouts_) {
      if (HomeOf(rollout) == replica) return rollout;
    }
    return "none";
  }

  static v1::TrainStepRequest Step(const std::string& step_id,
                                   const std::vector<std::string>& rollouts) {
    v1::TrainStepRequest step;
    step.set_step_id(step_id);
    step.mutable_optim()->set_learning_rate(0.01f);
    for (const std::string& rollout : rollouts) {
      v1::Group* group = step.add_groups();
      group->set_rollout_id(rollout);
      for (int i = 0; i < 2; ++i) {
        v1::Sample* sample = group->add_samples();
        sample->set_rollout_sample(i);
        sample->set_reward(static_cast<float>(i));
      }
    }
    return step;
  }
  grpc::Status Train(const v1::TrainStepRequest& step, v1::TrainStepResponse* response) {
    grpc::ClientContext context;
    return training_->TrainStep(&context, step, response);
  }
  // The same with what the rollouts hold, asked for through the router.
  v1::TrainStepRequest WithTokens(v1::TrainStepRequest step) {
    for (v1::Group& group : *step.mutable_groups()) {
      v1::GetRolloutRequest request;
      request.set_rollout_id(group.rollout_id());
      v1::GetRolloutResponse response;
      grpc::ClientContext context;
      const grpc::Status status = training_->GetRollout(&context, request, &response);
      EXPECT_TRUE(status.ok()) << status.error_message();
      *group.mutable_prompt() = response.rollout().prompt();
      for (v1::Sample& sample : *group.mutable_samples()) {
        const v1::RolloutSample& from = response.rollout().samples(sample.rollout_sample());
        *sample.mutable_token_ids()->mutable_ids() = from.token_ids();
        *sample.mutable_sampler_logprobs() = from.sampler_logprobs();
      }
    }
    return step;
  }

  std::vector<std::string> rollouts_;  // one of each replica
};

TEST_F(RouterTrainingTest, OneStepTrainsTheGroupsOfAllReplicas) {
  Start(3, kPatient);
  const std::map<std::string, std::string> keys = RetainOnAll(3);
  const v1::TrainStepRequest step = Step("step-1", rollouts_);
  const v1::TrainStepRequest explicit_step = WithTokens(step);
  v1::TrainStepResponse got, want;
  const grpc::Status status = Train(step, &got);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(got.policy_version(), 1u);
  EXPECT_EQ(Metric(*router_, "coppice_router_rollouts_fetched_total"), 2);

  const auto alone = Replica(0);
  grpc::ClientContext context;
  const auto training = v1::Training::NewStub(Channel(alone->grpc_port()));
  ASSERT_TRUE(training->TrainStep(&context, explicit_step, &want).ok());
  EXPECT_EQ(got.loss(), want.loss());
  EXPECT_GT(got.grad_norm(), 0);
  EXPECT_EQ(got.grad_norm(), want.grad_norm());
  EXPECT_EQ(got.tokens().SerializeAsString(), want.tokens().SerializeAsString());
  for (const auto& [name, value] : want.metrics()) EXPECT_EQ(got.metrics().at(name), value) << name;

  // The others are behind now, at once.
  for (const auto& [replica, key] : keys) {
    EXPECT_EQ(HomeOf(Retain(key)), Name(0)) << key;
    auto stream = Open(Request(key, 1));
    ASSERT_TRUE(stream->Finish().ok());
    EXPECT_EQ(stream->replica(), replica) << "what is not retained stays where it was";
  }
  EXPECT_FALSE(router_->AwaitLine("replica_mismatch kind=policy_version").empty());
  EXPECT_EQ(Metric(*router_, "coppice_router_replica_mismatches{kind=\"policy_version\"}"), 2);
}

TEST_F(RouterTrainingTest, AReplicaThatLoadsTheLeadersCheckpointTakesGroupsAgain) {
  Start(2, kPatient);
  const std::map<std::string, std::string> keys = RetainOnAll(2);
  v1::TrainStepResponse response;
  ASSERT_TRUE(Train(Step("step-1", rollouts_), &response).ok());
  grpc::ClientContext save_context, load_context;
  v1::SaveCheckpointRequest save;
  save.set_name("after-one");
  v1::SaveCheckpointResponse saved;
  ASSERT_TRUE(training_->SaveCheckpoint(&save_context, save, &saved).ok());
  v1::LoadCheckpointRequest load;
  load.set_name("after-one");
  v1::LoadCheckpointResponse loaded;
  const auto direct = v1::Training::NewStub(Channel(ports_[1]));
  ASSERT_TRUE(direct->LoadCheckpoint(&load_context, load, &loaded).ok());
  const absl::Time deadline = absl::Now() + kDeadline;
  while (HomeOf(Retain(keys.at(Name(1)))) != Name(1)) ASSERT_LT(absl::Now(), deadline);
}

TEST_F(RouterTrainingTest, AHomeThatIsGoneIsNamedUnlessTheLeaderHasWhatItNeeds) {
  Start(2, kPatient);
  const std::map<std::string, std::string> keys = RetainOnAll(2);
  const std::string brought = RolloutOf(Name(1)), left = Retain(keys.at(Name(1)));
  ASSERT_EQ(HomeOf(left), Name(1));
  v1::TrainStepResponse response;
  const grpc::Status unknown = Train(Step("step-1", {"rollout-1-0@coppice-1"}), &response);
  EXPECT_EQ(unknown.error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_THAT(unknown.error_message(), HasSubstr("want rollout-1-0@coppice-1 from coppice-1"));
  const grpc::Status nowhere = Train(Step("step-1", {"rollout-1-0@coppice-9"}), &response);
  EXPECT_EQ(nowhere.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(nowhere.error_message(), HasSubstr("rollout-1-0@coppice-9"));
  ASSERT_TRUE(Train(Step("step-1", {brought}), &response).ok());

  replicas_[1]->Signal(SIGKILL);
  replicas_[1]->Wait();

  v1::TrainStepRequest other = Step("step-2", {left});
  other.set_max_policy_lag(1);
  const grpc::Status gone = Train(other, &response);
  EXPECT_EQ(gone.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(gone.error_message(), HasSubstr("want " + left + " from coppice-1"));
  // The same step again, with and without what the leader never saw.
  v1::TrainStepResponse again;
  ASSERT_TRUE(Train(Step("step-1", {brought}), &again).ok());
  EXPECT_TRUE(again.repeated_step());
  EXPECT_EQ(again.policy_version(), 1u);
  ASSERT_TRUE(Train(Step("step-1", {left}), &again).ok());
  EXPECT_TRUE(again.repeated_step());
  // Another step on what was brought to it.
  v1::TrainStepRequest more = Step("step-3", {brought});
  more.set_max_policy_lag(1);
  const grpc::Status status = Train(more, &again);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(again.policy_version(), 2u);
}

TEST_F(RouterTrainingTest, AStepThatIsCancelledWhileItsRolloutsComeIsNeverTaken) {
  Start(2, kPatient);
  RetainOnAll(2);
  replicas_[1]->Freeze();
  v1::TrainStepResponse response;
  grpc::ClientContext context;
  grpc::Status status;
  std::thread call(
      [&] { status = training_->TrainStep(&context, Step("step-1", rollouts_), &response); });
  const absl::Time deadline = absl::Now() + kDeadline;
  const std::string open = "coppice_router_replica_open_requests{replica=\"coppice-1\"}";
  while (Metric(*router_, open) != 1 && absl::Now() < deadline) std::this_thread::yield();
  EXPECT_EQ(Metric(*router_, open), 1);
  context.TryCancel();
  call.join();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
  while (Metric(*router_, "coppice_router_open_requests") != 0) {
    ASSERT_LT(absl::Now(), deadline) << "the call to the home goes on";
  }
  replicas_[1]->Signal(SIGCONT);
  ASSERT_TRUE(Train(Step("step-1", rollouts_), &response).ok());
  EXPECT_FALSE(response.repeated_step());
  EXPECT_EQ(response.policy_version(), 1u);
}

TEST_F(RouterTrainingTest, AHomeThatHangsIsEjectedAndItsRolloutsAreMissed) {
  Start(2);
  RetainOnAll(2);
  replicas_[1]->Freeze();
  v1::TrainStepResponse response;
  const grpc::Status status = Train(Step("step-1", rollouts_), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("want " + RolloutOf(Name(1)) + " from coppice-1"));
  replicas_[1]->Signal(SIGCONT);
  AwaitServing(1);
  EXPECT_TRUE(Train(Step("step-1", rollouts_), &response).ok());
}

TEST_F(RouterTest, CacheAndAdminCallsAreMerged) {
  Start(2);
  const auto cache = v1::Cache::NewStub(channel_);
  v1::GetStatsResponse one, all;
  grpc::ClientContext one_context, all_context;
  ASSERT_TRUE(v1::Cache::NewStub(Channel(ports_[0]))->GetStats(&one_context, {}, &one).ok());
  ASSERT_TRUE(cache->GetStats(&all_context, {}, &all).ok());
  EXPECT_EQ(all.stats().total_blocks(), 2 * one.stats().total_blocks());
  EXPECT_EQ(all.block_tokens(), one.block_tokens());
  EXPECT_TRUE(HealthServing(channel_));
  EXPECT_EQ(Metric(*router_, "coppice_router_requests_total{rpc=\"cache\"}"), 1);
}

TEST_F(RouterTest, PauseAndResumeGoThroughTheRouter) {
  Start(2);
  const auto admin = v1::Admin::NewStub(channel_);
  v1::PauseResponse paused;
  grpc::ClientContext pause_context;
  ASSERT_TRUE(admin->Pause(&pause_context, {}, &paused).ok());
  for (int i = 0; i < 2; ++i) ASSERT_FALSE(router_->AwaitLine("replica_paused").empty());
  EXPECT_EQ(httplib::Client("127.0.0.1", router_->http_port()).Get("/readyz")->status, 200);
  EXPECT_TRUE(HealthServing(channel_));

  auto waiting = Open(Request("key", 8));
  v1::GetStatusResponse status;
  const absl::Time deadline = absl::Now() + kDeadline;
  do {
    grpc::ClientContext context;
    ASSERT_TRUE(admin->GetStatus(&context, {}, &status).ok());
    ASSERT_LT(absl::Now(), deadline) << "it does not wait in a replica's queue";
  } while (status.queued_requests() + status.running_requests() == 0);
  EXPECT_EQ(status.state(), v1::SERVING_STATE_PAUSED);

  v1::ResumeResponse resumed;
  grpc::ClientContext resume_context;
  ASSERT_TRUE(admin->Resume(&resume_context, {}, &resumed).ok());
  const grpc::Status finished = waiting->Finish();
  EXPECT_TRUE(finished.ok()) << finished.error_message();
  EXPECT_EQ(waiting->tokens, 8);
}

TEST_F(RouterTest, AReplicaThatComesBackWithAnotherModelGetsNothing) {
  Start(2);
  replicas_[1]->Signal(SIGTERM);
  EXPECT_EQ(replicas_[1]->Wait(), 0);
  replicas_[1] = Replica(ports_[1], "tiny-qwen3");
  EXPECT_THAT(router_->AwaitLine("replica_mismatch kind=model"), HasSubstr("replica=coppice-1"));
  for (const auto& [key, owner] : Owners()) EXPECT_EQ(owner, Name(0));
  EXPECT_EQ(Metric(*router_, "coppice_router_replicas{state=\"mismatched\"}"), 1);
}

TEST_F(RouterTest, BadConfigurationsSaySo) {
  const std::vector<std::string> common = {"--role=router", "--port=0", "--http_port=0"};
  const auto run = [&](std::vector<std::string> args) {
    args.insert(args.begin(), common.begin(), common.end());
    return Run(std::move(args));
  };
  auto none = run({});
  EXPECT_EQ(none->Wait(), 2);
  EXPECT_THAT(none->log(), HasSubstr("exactly one of --replicas and --replica_dns"));
  auto no_port = run({"--replicas=localhost"});
  EXPECT_EQ(no_port->Wait(), 2);
  EXPECT_THAT(no_port->log(), HasSubstr("want HOST:PORT, got \"localhost\""));
  auto twice = run({"--replicas=a=localhost:1,a=localhost:2"});
  EXPECT_EQ(twice->Wait(), 2);
  EXPECT_THAT(twice->log(), HasSubstr("every name once"));
  auto nobody = run({"--replicas=a=localhost:1,b=localhost:2", "--leader=c"});
  EXPECT_EQ(nobody->Wait(), 2);
  EXPECT_THAT(nobody->log(), HasSubstr("want one of a, b, got c"));

  auto nowhere = run({"--replica_dns=no-such-host.invalid:7700"});
  EXPECT_FALSE(nowhere->AwaitLine("resolve_failed").empty());
  ASSERT_TRUE(nowhere->AwaitReady());
  EXPECT_GE(Metric(*nowhere, "coppice_router_resolve_failures_total"), 1);
  const auto ready = httplib::Client("127.0.0.1", nowhere->http_port()).Get("/readyz");
  EXPECT_EQ(ready->status, 503);
  EXPECT_EQ(ready->body, "no_replica\n");
  auto taken = Run({"--role=router", "--replicas=localhost:1", "--http_port=0",
                    absl::StrCat("--port=", nowhere->grpc_port())});
  EXPECT_EQ(taken->Wait(), 4);
  EXPECT_THAT(taken->log(), HasSubstr("port taken"));
  nowhere->Signal(SIGTERM);
  EXPECT_EQ(nowhere->Wait(), 0);

  replicas_.push_back(Replica(0, "tiny-llama"));
  replicas_.push_back(Replica(0, "tiny-qwen3"));
  // Both are asked before it serves; on a busy machine an answer takes longer than usual.
  auto mixed = run(
      {"--health_timeout_ms=60000", absl::StrCat("--replicas=localhost:", replicas_[0]->grpc_port(),
                                                 ",localhost:", replicas_[1]->grpc_port())});
  EXPECT_EQ(mixed->Wait(), 3);
  EXPECT_THAT(mixed->log(), HasSubstr("want one model, got"));
}

TEST_F(RouterTest, SigtermLetsStreamsFinishAndASecondSignalDoesNot) {
  Start(1);
  auto stream = Open(Request("key", 1500));
  ASSERT_TRUE(stream->Read());
  router_->Signal(SIGTERM);
  ASSERT_FALSE(router_->AwaitLine("drain_started").empty());
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(stream->tokens, 1500);
  EXPECT_EQ(router_->Wait(), 0);

  StartRouter();
  auto endless = Open(Request("key", 4000));
  ASSERT_TRUE(endless->Read());
  router_->Signal(SIGTERM);
  ASSERT_FALSE(router_->AwaitLine("drain_started").empty());
  router_->Signal(SIGTERM);
  EXPECT_EQ(router_->Wait(), 5);
  EXPECT_EQ(endless->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(RouterTest, HitsArePredictedAndConfirmed) {
  Start(2);
  v1::GenerateRequest request = Request("", 1);
  for (int i = 0; i < 640; ++i) request.mutable_prompt()->mutable_tokens()->add_ids(i % 250);
  ASSERT_TRUE(Open(request)->Finish().ok());
  EXPECT_EQ(Metric(*router_, "coppice_router_hit_tokens_predicted_total"), 0);
  ASSERT_TRUE(Open(request)->Finish().ok());
  EXPECT_EQ(Metric(*router_, "coppice_router_prompt_tokens_total"), 2 * 660);
  EXPECT_EQ(Metric(*router_, "coppice_router_hit_tokens_predicted_total"), 512);
  EXPECT_GE(Metric(*router_, "coppice_router_hit_tokens_confirmed_total"), 640);
}

TEST_F(RouterTest, ACallSaysWhereItWentIfAsked) {
  Start(2);
  v1::GenerateRequest request = Request("key", 4, /*n=*/2);
  auto asked = Open(request);
  ASSERT_TRUE(asked->Finish().ok());
  const v1::Placement& placement = asked->group.placement();
  EXPECT_THAT(placement.replica(), HasSubstr("coppice-"));
  EXPECT_EQ(placement.reason(), v1::Placement::HOME);
  EXPECT_EQ(placement.home(), placement.replica());
  EXPECT_EQ(placement.prefix_hash().size(), 16u);
  EXPECT_EQ(placement.load(), 0);
  EXPECT_GT(placement.charge(), 0);
  EXPECT_EQ(placement.attempts(), 1);
  EXPECT_EQ(asked->group.usage().completion_tokens(), 8) << "the replica's own fields stay";

  Stream unasked, direct;
  unasked.reader = generation_->Generate(&unasked.context, request);
  ASSERT_TRUE(unasked.Finish().ok());
  EXPECT_FALSE(unasked.group.has_placement());
  request.set_explain_placement(true);
  const auto daemon = v1::Generation::NewStub(Channel(ports_[0]));
  direct.reader = daemon->Generate(&direct.context, request);
  ASSERT_TRUE(direct.Finish().ok());
  EXPECT_FALSE(direct.group.has_placement());
}

TEST_F(RouterTest, WithoutAReplicaCallsFailAtOnce) {
  Start(1);
  replicas_[0]->Signal(SIGKILL);
  replicas_[0]->Wait();
  auto stream = Open(Request("key", 1));
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  ASSERT_FALSE(router_->AwaitLine("replica_ejected").empty());
  auto later = Open(Request("key", 1));
  EXPECT_THAT(later->Finish().error_message(), HasSubstr("coppice-0 ejected"));
  const absl::Time deadline = absl::Now() + kDeadline;
  while (HealthServing(channel_)) ASSERT_LT(absl::Now(), deadline);
  Restart(0);
  AwaitServing(0);
  EXPECT_TRUE(Open(Request("key", 1))->Finish().ok());
}

}  // namespace
}  // namespace coppice
