// router_bench COPPICED [GEOMETRY]: what the router costs beside calling a replica directly, with
// 200 streams open. Two JSON lines:
//
//   router_first_token  The replica is a stand-in here that answers at once and then sends every
//                       stream a token each 50 ms, a tenth of them each 5 ms; while 200 streams run
//                       through the router, probes ask for their first message, directly and
//                       through it in turn.
//   router_cpu          The replica is a real coppiced with random weights; 200 streams through the
//                       router, then as many directly. CPU seconds of each process by /proc.
#include <atomic>
#include <fstream>
#include <iostream>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coppice/v1/admin.grpc.pb.h"
#include "coppice/v1/generation.grpc.pb.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/credentials.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "nlohmann/json.hpp"
#include "tests/bench/commit.h"
#include "tests/support/daemon_process.h"

namespace coppice::bench {
namespace {

constexpr int kStreams = 200, kProbes = 2000, kPromptTokens = 64, kRealTokens = 16;
constexpr int kTurns = 10;
constexpr std::chrono::milliseconds kPace(50);

// A stream of the stand-in: Started at once, then a token at every Tick.
class PacedStream final : public grpc::ServerWriteReactor<v1::GenerateEvent> {
 public:
  PacedStream(int tokens, std::function<void(PacedStream*)> gone)
      : tokens_left_(tokens), gone_(std::move(gone)) {
    event_.mutable_started()->set_seed(1);
    StartWrite(&event_);
  }
  void Tick() {
    const std::lock_guard lock(mutex_);
    if (writing_ || finished_) return;
    if (tokens_left_ == 0 || cancelled_) {
      finished_ = true;
      return Finish(grpc::Status::OK);
    }
    --tokens_left_;
    event_.mutable_chunk()->mutable_token_ids()->Resize(1, 7);
    writing_ = true;
    StartWrite(&event_);
  }
  void OnWriteDone(bool) override {
    bool ends = false;
    {
      const std::lock_guard lock(mutex_);
      writing_ = false;
      ends = tokens_left_ == 0 && !finished_;
      finished_ = finished_ || ends;
    }
    if (ends) Finish(grpc::Status::OK);  // the last: this may be gone then
  }
  void OnCancel() override { cancelled_ = true; }
  void OnDone() override {
    gone_(this);
    delete this;
  }

 private:
  std::mutex mutex_;
  v1::GenerateEvent event_;
  bool writing_ = true, finished_ = false;
  std::atomic<bool> cancelled_{false};
  int tokens_left_;
  const std::function<void(PacedStream*)> gone_;
};

class PacedGeneration final : public v1::Generation::CallbackService {
 public:
  grpc::ServerWriteReactor<v1::GenerateEvent>* Generate(
      grpc::CallbackServerContext*, const v1::GenerateRequest* request) override {
    auto* stream = new PacedStream(request->sampling().max_tokens(), [this](PacedStream* gone) {
      const std::lock_guard lock(mutex_);
      streams_.erase(gone);
    });
    const std::lock_guard lock(mutex_);
    streams_.insert(stream);
    return stream;
  }
  // Every stream has its turn once in kTurns.
  void Tick() {
    const std::lock_guard lock(mutex_);
    size_t at = ++turn_;
    for (PacedStream* stream : streams_) {
      if (at++ % kTurns == 0) stream->Tick();
    }
  }

 private:
  std::mutex mutex_;
  std::set<PacedStream*> streams_;
  size_t turn_ = 0;
};

class StandInAdmin final : public v1::Admin::CallbackService {
  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* call,
                                      const v1::GetStatusRequest*,
                                      v1::GetStatusResponse* response) override {
    response->set_block_tokens(16);
    response->mutable_cache()->set_total_blocks(1 << 16);
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
};

class StandIn {
 public:
  StandIn() {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(&generation_);
    builder.RegisterService(&admin_);
    server_ = builder.BuildAndStart();
    CHECK(server_ != nullptr);
    pacer_ = std::thread([this] {
      auto next = std::chrono::steady_clock::now();
      while (!stop_) {
        std::this_thread::sleep_until(next += kPace / kTurns);
        generation_.Tick();
      }
    });
  }
  ~StandIn() {
    server_->Shutdown(std::chrono::system_clock::now());
    stop_ = true;
    pacer_.join();
  }
  int port() const { return port_; }

 private:
  PacedGeneration generation_;
  StandInAdmin admin_;
  std::unique_ptr<grpc::Server> server_;
  std::thread pacer_;
  std::atomic<bool> stop_{false};
  int port_ = 0;
};

std::unique_ptr<v1::Generation::Stub> Connect(int port) {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return v1::Generation::NewStub(grpc::CreateCustomChannel(
      absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials(), args));
}

v1::GenerateRequest Request(int key, int max_tokens) {
  v1::GenerateRequest request;
  for (int i = 0; i < kPromptTokens; ++i) {
    request.mutable_prompt()->mutable_tokens()->add_ids((key * 31 + i * 7) % 250);
  }
  request.mutable_sampling()->set_max_tokens(max_tokens);
  request.mutable_sampling()->set_ignore_eos(true);
  return request;
}

// Seconds to the first message. Reads to the end.
double FirstMessageSeconds(v1::Generation::Stub& stub, const v1::GenerateRequest& request,
                           std::atomic<int64_t>* messages = nullptr) {
  const SteadyClock clock;
  grpc::ClientContext context;
  v1::GenerateEvent event;
  const absl::Duration begin = clock.Now();
  const auto reader = stub.Generate(&context, request);
  CHECK(reader->Read(&event));
  const double seconds = absl::ToDoubleSeconds(clock.Now() - begin);
  do {
    if (messages != nullptr) ++*messages;
  } while (reader->Read(&event));
  const grpc::Status status = reader->Finish();
  CHECK(status.ok()) << status.error_message();
  return seconds;
}

std::unique_ptr<DaemonProcess> StartRouter(const std::string& coppiced, int replica_port) {
  auto router = std::make_unique<DaemonProcess>(
      coppiced, std::vector<std::string>{"--role=router", "--port=0", "--http_port=0",
                                         absl::StrCat("--replicas=127.0.0.1:", replica_port)});
  CHECK(router->AwaitReady()) << router->log();
  return router;
}

double Percentile(std::vector<double> values, double share) {
  const auto at = static_cast<size_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(at), values.end());
  return values[at];
}

void BenchFirstToken(const std::string& coppiced) {
  const StandIn replica;
  const auto router = StartRouter(coppiced, replica.port());
  const auto direct = Connect(replica.port()), routed = Connect(router->grpc_port());
  std::atomic<bool> stop{false};
  std::vector<std::thread> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.emplace_back([&, i] {
      while (!stop) FirstMessageSeconds(*routed, Request(i, 40));
    });
  }
  const double cpu_before = router->CpuSeconds();
  const SteadyClock clock;
  const absl::Duration begin = clock.Now();
  std::vector<double> direct_s, routed_s;
  for (int i = 0; i < kProbes; ++i) {
    direct_s.push_back(FirstMessageSeconds(*direct, Request(i, 0)));
    routed_s.push_back(FirstMessageSeconds(*routed, Request(i, 0)));
  }
  const double cores =
      (router->CpuSeconds() - cpu_before) / absl::ToDoubleSeconds(clock.Now() - begin);
  stop = true;
  for (std::thread& stream : streams) stream.join();
  const nlohmann::ordered_json line = {
      {"bench", "router_first_token"},
      {"streams", kStreams},
      {"tokens_per_second_per_stream", 1000 / kPace.count()},
      {"probes", kProbes},
      {"direct_p50_s", Percentile(direct_s, 0.5)},
      {"routed_p50_s", Percentile(routed_s, 0.5)},
      {"added_p50_s", Percentile(routed_s, 0.5) - Percentile(direct_s, 0.5)},
      {"direct_p99_s", Percentile(direct_s, 0.99)},
      {"routed_p99_s", Percentile(routed_s, 0.99)},
      {"router_cores", cores},
      {"commit", kCommit},
  };
  std::cout << line.dump() << std::endl;
}

// CPU seconds of daemon and router for kStreams streams; messages counted.
struct Cost {
  double daemon_s, router_s;
  int64_t messages;
};
Cost RunStreams(v1::Generation::Stub& stub, const DaemonProcess& daemon,
                const DaemonProcess& router, int first_key) {
  const double daemon_before = daemon.CpuSeconds(), router_before = router.CpuSeconds();
  std::atomic<int64_t> messages{0};
  std::vector<std::thread> streams;
  for (int i = 0; i < kStreams; ++i) {
    streams.emplace_back(
        [&, i] { FirstMessageSeconds(stub, Request(first_key + i, kRealTokens), &messages); });
  }
  for (std::thread& stream : streams) stream.join();
  return {daemon.CpuSeconds() - daemon_before, router.CpuSeconds() - router_before, messages};
}

void BenchCpu(const std::string& coppiced, const std::string& geometry) {
  DaemonProcess daemon(coppiced, {"--model_geometry=" + geometry, "--seed=1", "--port=0",
                                  "--http_port=0", "--max_context=512"});
  CHECK(daemon.AwaitReady()) << daemon.log();
  const auto router = StartRouter(coppiced, daemon.grpc_port());
  const auto direct = Connect(daemon.grpc_port()), routed = Connect(router->grpc_port());
  FirstMessageSeconds(*routed, Request(0, 4));  // both connections, and the model, are warm
  FirstMessageSeconds(*direct, Request(0, 4));
  const Cost through = RunStreams(*routed, daemon, *router, 1000);
  const Cost alone = RunStreams(*direct, daemon, *router, 2000);
  const nlohmann::ordered_json line = {
      {"bench", "router_cpu"},
      {"geometry", geometry},
      {"streams", kStreams},
      {"tokens_per_stream", kRealTokens},
      {"messages", through.messages},
      {"direct_daemon_cpu_s", alone.daemon_s},
      {"routed_daemon_cpu_s", through.daemon_s},
      {"router_cpu_s", through.router_s},
      {"router_cpu_s_per_message", through.router_s / static_cast<double>(through.messages)},
      {"router_share_of_direct", through.router_s / alone.daemon_s},
      {"commit", kCommit},
  };
  std::cout << line.dump() << std::endl;
}

int Main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    std::cerr << "usage: router_bench COPPICED [GEOMETRY]\n";
    return 2;
  }
  BenchFirstToken(argv[1]);
  BenchCpu(argv[1], argc == 3 ? argv[2] : "smollm2-135m");
  return 0;
}

}  // namespace
}  // namespace coppice::bench

int main(int argc, char** argv) { return coppice::bench::Main(argc, argv); }
