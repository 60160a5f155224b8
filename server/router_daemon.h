// RouterDaemon: coppiced --role=router. The router between its HTTP server and its signals.
//
//   HTTP (not ready) -> Router: port, replicas -> ready; SIGTERM -> health NOT_SERVING -> open
//   calls end (bounded) -> Router -> HTTP
//
// Thread: main.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "kernels/base/clock.h"
#include "server/config.h"
#include "server/exit_code.h"
#include "server/http/http_server.h"
#include "server/life_events.h"
#include "server/router/router.h"

namespace coppice {

class RouterDaemon {
 public:
  explicit RouterDaemon(Config config) : config_(std::move(config)) {}

  // Everything: start, route until a signal, drain, stop. Call once.
  ExitCode Run();

 private:
  absl::Status StartHttp();
  absl::Status StartRouter();
  absl::Status AnnounceReady();
  ExitCode Drain(LifeEvents& events);

  const Config config_;
  SteadyClock clock_;
  RouterMetrics metrics_;
  std::atomic<Router*> serving_{nullptr};  // once it runs, for the HTTP server's threads
  std::unique_ptr<Router> router_;
  std::unique_ptr<HttpServer> http_;  // goes first: its callbacks look at the router
};

}  // namespace coppice
