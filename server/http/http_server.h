// HttpServer: GET /metrics, /healthz and /readyz for Prometheus and Kubernetes. No request changes
// anything.
//
// Threads: its own accept thread and a few workers (cpp-httplib). The callbacks run there: they
// must be thread-safe and quick. Owner: the daemon. Create binds the port, the destructor stops and
// joins.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace coppice {

class HttpServer {
 public:
  struct Options {
    std::string host = "127.0.0.1";
    int port = 0;                          // 0 = any free one, see port()
    std::function<std::string()> metrics;  // body of /metrics, text exposition format 0.0.4
    // Body of /readyz if not ready ("loading", "paused", "draining"): 503. Empty = ready: 200.
    std::function<std::string()> not_ready_reason;
    // False: /healthz is 503, the process cannot serve any more and is about to end.
    std::function<bool()> healthy = [] { return true; };
  };
  // UNAVAILABLE if the port is taken or the host is not an address of this machine.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(Options options);
  virtual ~HttpServer() = default;

  virtual int port() const = 0;
};

}  // namespace coppice
