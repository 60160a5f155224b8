// Unary calls: what a handler returns. Handlers run on gRPC's threads and never wait; the engine
// answers later through a Reply on its own thread. Request and response live until the reactor's
// Finish has been sent, also if the caller is gone.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/server_context.h"
#include "grpcpp/support/server_callback.h"
#include "server/engine/engine.h"
#include "server/rpc/convert.h"

namespace coppice {

inline grpc::ServerUnaryReactor* FinishNow(grpc::CallbackServerContext* context,
                                           const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

// A Reply that hands an OK value to `fill(T)` and then finishes the call.
template <typename T, typename Fill>
Reply<T> FinishWith(grpc::ServerUnaryReactor* reactor, Fill fill) {
  return [reactor, fill = std::move(fill)](absl::StatusOr<T> result) {
    const absl::Status status = result.status();
    if (status.ok()) fill(*std::move(result));
    reactor->Finish(ToGrpcStatus(status));
  };
}

}  // namespace coppice
