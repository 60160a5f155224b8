#include "server/router_daemon.h"

#include <cstdlib>
#include <thread>

#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "server/life_events.h"
#include "server/port_file.h"

namespace coppice {
namespace {

ExitCode Fail(ExitCode code, const absl::Status& status) {
  LOG(ERROR) << "start_failed exit_code=" << static_cast<int>(code) << ' ' << status.message();
  return code;
}

// Of what Router::Start says.
ExitCode CodeOf(const absl::Status& status) {
  if (absl::IsAlreadyExists(status)) return ExitCode::kPortTaken;
  return absl::IsInvalidArgument(status) ? ExitCode::kBadFlags : ExitCode::kModelError;
}

}  // namespace

ExitCode RouterDaemon::Run() {
  LOG(INFO) << "start " << ToString(config_);
  if (absl::Status s = StartHttp(); !s.ok()) return Fail(ExitCode::kPortTaken, s);
  // Not before: a second process with these flags has ended above, and the first one's file stays.
  if (absl::Status s = RemovePortFile(config_.port_file); !s.ok()) {
    return Fail(ExitCode::kRuntimeError, s);
  }
  LifeEvents events;
  if (absl::Status s = StartRouter(); !s.ok()) return Fail(CodeOf(s), s);
  if (absl::Status s = AnnounceReady(); !s.ok()) return Fail(ExitCode::kRuntimeError, s);
  while (LifeEvents::num_signals() == 0) events.Wait(absl::InfiniteDuration());
  return Drain(events);
}

absl::Status RouterDaemon::StartHttp() {
  HttpServer::Options options;
  options.host = config_.host;
  options.port = static_cast<int>(config_.http_port);
  options.metrics = [this] { return metrics_.Serialize(); };
  options.not_ready_reason = [this] {
    const Router* router = serving_;
    return router == nullptr ? std::string("loading") : router->NotReadyReason();
  };
  ASSIGN_OR_RETURN(http_, HttpServer::Start(std::move(options)));
  return absl::OkStatus();
}

absl::Status RouterDaemon::StartRouter() {
  Router::Options options;
  options.host = config_.host;
  options.port = static_cast<int>(config_.port);
  options.max_message_bytes = config_.max_message_bytes;
  options.trust_tenant_header = config_.trust_tenant_header;
  options.fleet.leader = config_.leader;
  options.fleet.eject_after = config_.eject_after;
  options.fleet.first_byte_timeout = absl::Seconds(config_.first_byte_timeout_s);
  options.watcher = {.replicas = config_.replicas,
                     .replica_dns = config_.replica_dns,
                     .dns_interval = absl::Seconds(config_.replica_dns_interval_s),
                     .health_interval = absl::Milliseconds(config_.health_interval_ms),
                     .health_timeout = absl::Milliseconds(config_.health_timeout_ms)};
  ASSIGN_OR_RETURN(router_, Router::Start(options, metrics_, clock_));
  serving_ = router_.get();
  return absl::OkStatus();
}

absl::Status RouterDaemon::AnnounceReady() {
  RETURN_IF_ERROR(WritePortFile(config_.port_file, router_->port(), http_->port()));
  LOG(INFO) << "ready grpc=" << config_.host << ':' << router_->port() << " http=" << config_.host
            << ':' << http_->port() << " replicas_serving=" << router_->num_serving();
  return absl::OkStatus();
}

ExitCode RouterDaemon::Drain(LifeEvents& events) {
  LOG(INFO) << "drain_started timeout_s=" << config_.drain_timeout_s
            << " note=\"a second signal stops at once\"";
  router_->SetDraining();
  std::atomic<bool> ended{false};
  bool drained = false;
  std::thread shutdown([&] {
    drained = router_->Shutdown(absl::Seconds(config_.drain_timeout_s));
    ended = true;
    events.Post();
  });
  while (!ended && LifeEvents::num_signals() < 2) events.Wait(absl::InfiniteDuration());
  const bool in_time = ended;
  if (in_time) shutdown.join();
  if (in_time && drained) {
    LOG(INFO) << "stopped drained=yes";
    return ExitCode::kDrained;
  }
  LOG(WARNING) << "stopped drained=no exit_code=" << static_cast<int>(ExitCode::kNotDrained)
               << " open calls were cancelled; raise --drain_timeout_s to let them finish";
  // The calls that are left end with their connections.
  if (!in_time) std::_Exit(static_cast<int>(ExitCode::kNotDrained));
  return ExitCode::kNotDrained;
}

}  // namespace coppice
