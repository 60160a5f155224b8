#include "server/router/watcher.h"

#include <chrono>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/blocking_counter.h"
#include "coppice/v1/admin.grpc.pb.h"
#include "grpcpp/generic/generic_stub.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

constexpr char kHealthMethod[] = "/grpc.health.v1.Health/Check";
// Rounds raised by suspicion are at least so far apart.
constexpr absl::Duration kPokeInterval = absl::Milliseconds(50);

// HealthCheckResponse { ServingStatus status = 1; }, SERVING = 1; the request is empty.
ReplicaReport::Health ParseHealth(const grpc::ByteBuffer& response) {
  grpc::Slice bytes;
  const bool serving = response.TrySingleSlice(&bytes).ok() && bytes.size() == 2 &&
                       bytes.begin()[0] == 0x08 && bytes.begin()[1] == 1;
  return serving ? ReplicaReport::Health::kServing : ReplicaReport::Health::kNotServing;
}

std::string Describe(const v1::ModelInfo& model) {
  return absl::StrCat(model.architecture(), " parameters=", model.num_parameters(),
                      " layers=", model.num_layers(), " hidden=", model.hidden(),
                      " vocab=", model.vocab_size(), " tokenizer=", model.has_tokenizer());
}

ReplicaReport::Facts ToFacts(const v1::GetStatusResponse& status) {
  return {.model = Describe(status.model()),
          .policy_version = status.policy_version(),
          .cache_tokens = status.cache().total_blocks() * status.block_tokens(),
          .uptime = absl::Seconds(status.uptime().seconds()),
          .draining = status.state() == v1::SERVING_STATE_DRAINING};
}

// Two questions to one replica; both end by the deadline.
struct Probe {
  Probe(const ReplicaTarget& replica, absl::Duration timeout)
      : target(replica), health_stub(replica.channel), admin(replica.channel) {
    const auto deadline = std::chrono::system_clock::now() + absl::ToChronoNanoseconds(timeout);
    health_context.set_deadline(deadline);
    admin_context.set_deadline(deadline);
  }

  void Ask(absl::BlockingCounter& open) {
    health_stub.UnaryCall(&health_context, kHealthMethod, {}, &empty, &health,
                          [this, &open](grpc::Status status) {
                            health_status = std::move(status);
                            open.DecrementCount();
                          });
    admin.async()->GetStatus(&admin_context, &request, &facts, [this, &open](grpc::Status status) {
      facts_status = std::move(status);
      open.DecrementCount();
    });
  }

  ReplicaReport Report(uint64_t policy_epoch) const {
    ReplicaReport report;
    report.policy_epoch = policy_epoch;
    if (health_status.ok()) {
      report.health = ParseHealth(health);
    } else {
      report.error = health_status.error_message();
    }
    if (facts_status.ok()) report.facts = ToFacts(facts);
    return report;
  }

  const ReplicaTarget target;
  grpc::GenericStub health_stub;
  v1::Admin::Stub admin;
  grpc::ClientContext health_context, admin_context;
  grpc::ByteBuffer empty{nullptr, 0}, health;
  v1::GetStatusRequest request;
  v1::GetStatusResponse facts;
  grpc::Status health_status, facts_status;
};

}  // namespace

absl::Status Watcher::Start() {
  absl::Status resolved = Resolve();
  if (absl::IsInvalidArgument(resolved)) return resolved;
  if (!options_.replicas.empty()) RETURN_IF_ERROR(fleet_.CheckLeader());
  Round();
  RETURN_IF_ERROR(fleet_.CheckModels());
  thread_ = std::thread([this] { Run(); });
  if (!options_.replica_dns.empty()) resolver_ = std::thread([this] { RunResolver(); });
  return absl::OkStatus();
}

void Watcher::Stop() {
  if (!thread_.joinable()) return;
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
  if (resolver_.joinable()) resolver_.join();
}

void Watcher::Poke() {
  absl::MutexLock lock(&mutex_);
  poked_ = true;
}

absl::Status Watcher::Resolve() {
  absl::StatusOr<std::vector<ReplicaAddress>> members = options_.replicas.empty()
                                                            ? ResolveReplicas(options_.replica_dns)
                                                            : ParseReplicas(options_.replicas);
  if (!members.ok()) {
    metrics_.resolve_failures.Increment();
    // Once each time it begins: a service without pods has no addresses for a while.
    if (resolves_) LOG(WARNING) << "resolve_failed " << members.status().message();
    resolves_ = false;
    return members.status();
  }
  resolves_ = true;
  fleet_.SetMembers(*members);
  return absl::OkStatus();
}

void Watcher::Round() {
  const uint64_t policy_epoch = fleet_.policy_epoch();
  std::vector<std::unique_ptr<Probe>> probes;
  for (const ReplicaTarget& target : fleet_.Members()) {
    probes.push_back(std::make_unique<Probe>(target, options_.health_timeout));
  }
  absl::BlockingCounter open(static_cast<int>(2 * probes.size()));
  for (const auto& probe : probes) probe->Ask(open);
  open.Wait();
  for (const auto& probe : probes) {
    fleet_.Update(probe->target.id, probe->Report(policy_epoch));
  }
  fleet_.CancelLate();
  changed_();
}

void Watcher::Run() {
  for (;;) {
    const absl::Duration began = clock_.Now();
    {
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(&stopping_), kPokeInterval);
      const auto called = [this]()
                              ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stopping_ || poked_; };
      mutex_.AwaitWithTimeout(absl::Condition(&called),
                              options_.health_interval - (clock_.Now() - began));
      if (stopping_) return;
      poked_ = false;
    }
    Round();
  }
}

void Watcher::RunResolver() {
  for (;;) {
    {
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithTimeout(absl::Condition(&stopping_), options_.dns_interval);
      if (stopping_) return;
    }
    Resolve().IgnoreError();  // the replicas known so far go on
  }
}

}  // namespace coppice
