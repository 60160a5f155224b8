// Router: one gRPC address in front of many replicas. Takes every method of coppice.v1 as bytes
// (Route says what becomes of it) and answers grpc.health.v1 itself: SERVING iff a replica answers
// health checks, be it paused, so that Resume can come in.
//
// Owner: the router's daemon. Threads: gRPC's, and the watcher's.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/router/call_context.h"

namespace coppice {

class Router {
 public:
  struct Options {
    std::string host = "127.0.0.1";
    int port = 0;  // 0 = any free one, see port()
    int64_t max_message_bytes = int64_t{256} << 20;
    bool trust_tenant_header = false;
    Fleet::Options fleet;
    Watcher::Options watcher;
  };
  // Listens, finds the replicas, asks each once. ALREADY_EXISTS: the port is taken; else as
  // Watcher::Start. `metrics` and `clock` outlive it.
  static absl::StatusOr<std::unique_ptr<Router>> Start(const Options& options,
                                                       RouterMetrics& metrics, const Clock& clock);
  virtual ~Router() = default;

  virtual int port() const = 0;
  virtual int64_t num_serving() const = 0;
  // Empty = ready; else "draining" or "no_replica". Any thread.
  virtual std::string NotReadyReason() const = 0;
  // Health is NOT_SERVING from now on.
  virtual void SetDraining() = 0;
  // Takes no more calls and waits for open ones; cancels those that are left after `grace`, and
  // then returns false.
  virtual bool Shutdown(absl::Duration grace) = 0;
};

}  // namespace coppice
