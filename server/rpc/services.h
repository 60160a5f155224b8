// The four services of coppice.v1, as gRPC callback services: validate, submit to the engine,
// answer. They hold no state; all of it is the engine's.
//
// Threads: handlers run on gRPC's threads, replies and stream events on the engine thread; none of
// them blocks.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/impl/service_type.h"
#include "grpcpp/server_context.h"
#include "kernels/base/clock.h"
#include "kernels/model/model_loader.h"
#include "server/engine/engine.h"
#include "server/rpc/convert.h"
#include "server/rpc/readiness.h"

namespace coppice {

// What every service borrows; outlives the server.
struct RpcContext {
  Engine& engine;
  const Model& model;
  const Clock& clock;
  Readiness& readiness;
  EngineOptions engine_options;  // max_context resolved
  int64_t max_message_bytes = 0;
  int64_t stream_capacity = 256;     // events waiting for a slow reader before its request pauses
  bool trust_tenant_header = false;  // an authenticating proxy sets x-coppice-tenant
  std::string checkpoint_dir;        // empty: checkpoints are refused
  std::string version;               // of the daemon
  absl::Duration started_at;         // on `clock`
  std::vector<std::pair<std::string, int64_t>> memory_plan;  // name, bytes

  RequestLimits limits() const {
    return {.vocab = model.config.vocab,
            .max_context = engine_options.max_context,
            .max_group_size = engine_options.max_group_size,
            .tokenizer = model.tokenizer.get()};
  }
};

// Metadata key of the tenant's name.
inline constexpr char kTenantHeader[] = "x-coppice-tenant";

// The caller's tenant: from kTenantHeader if the header is trusted, else the one default.
// UNAUTHENTICATED if it is trusted but absent, given twice or no plain name. Every call of
// Generation, Training and Cache asks for it; Admin is the operator's and does not.
absl::StatusOr<Tenant> TenantOf(const grpc::CallbackServerContext& call, const RpcContext& context);

// Subdirectory of checkpoint_dir that holds the durable steps. No checkpoint may be named so.
inline constexpr char kDurableSteps[] = "durable";

std::unique_ptr<grpc::Service> NewGenerationService(const RpcContext& context);
std::unique_ptr<grpc::Service> NewTrainingService(const RpcContext& context);
std::unique_ptr<grpc::Service> NewCacheService(const RpcContext& context);
std::unique_ptr<grpc::Service> NewAdminService(const RpcContext& context);

}  // namespace coppice
