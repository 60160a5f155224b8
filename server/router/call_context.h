// What every call of the router borrows, and the little that all kinds of calls do alike.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "grpcpp/client_context.h"
#include "grpcpp/generic/async_generic_service.h"
#include "kernels/base/clock.h"
#include "server/router/fleet.h"
#include "server/router/router_metrics.h"
#include "server/router/routes.h"
#include "server/router/watcher.h"

namespace coppice {

struct RouterContext {
  Fleet& fleet;
  Watcher& watcher;
  RouterMetrics& metrics;
  const Clock& clock;
  bool trust_tenant_header = false;
};

// The caller's metadata value; empty if absent.
std::string Header(const grpc::CallbackServerContext& call, const std::string& key);

// Deadline and metadata of `call`, but for what belongs to one connection.
void PassOn(const grpc::CallbackServerContext& call, grpc::ClientContext& upstream);
// The replica's trailing metadata, to the caller.
void PassBack(const grpc::ClientContext& upstream, grpc::CallbackServerContext& call);

// What the end of an attempt says: UNAVAILABLE for what a replica's end or the fleet did to it,
// with the replica's name.
grpc::Status Meaning(const grpc::Status& status, const OpenAttempt& attempt,
                     const std::string& replica, bool caller_gone,
                     const grpc::CallbackServerContext& call);

grpc::Status ToGrpc(const absl::Status& status);
void CountResponse(RouterMetrics& metrics, const grpc::Status& status);

}  // namespace coppice
