// RpcServer: the gRPC server with the four services, health v1 and reflection.
//
// Owner: the daemon; the context's engine outlives it, and its thread runs until Shutdown has
// returned, since open calls end by the engine's answers.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/rpc/services.h"

namespace coppice {

class RpcServer {
 public:
  struct Options {
    std::string host = "127.0.0.1";
    int port = 0;  // 0 = any free one, see port()
  };
  // UNAVAILABLE if the port is taken. Health is NOT_SERVING until SetServing(true).
  static absl::StatusOr<std::unique_ptr<RpcServer>> Start(const Options& options,
                                                          RpcContext context);
  virtual ~RpcServer() = default;

  virtual int port() const = 0;
  // What grpc.health.v1.Health answers, for "" and every service. Any thread.
  virtual void SetServing(bool serving) = 0;
  // Accepts no more calls; waits for open ones, and cancels those that are left after `grace`.
  virtual void Shutdown(absl::Duration grace) = 0;
};

}  // namespace coppice
