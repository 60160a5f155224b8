#include <optional>
#include <utility>

#include "coppice/v1/admin.grpc.pb.h"
#include "coppice/v1/cache.grpc.pb.h"
#include "server/rpc/field_check.h"
#include "server/rpc/services.h"
#include "server/rpc/unary.h"

namespace coppice {
namespace {

class CacheService final : public v1::Cache::CallbackService {
 public:
  explicit CacheService(const RpcContext& context) : context_(context) {}

  grpc::ServerUnaryReactor* GetStats(grpc::CallbackServerContext* call, const v1::GetStatsRequest*,
                                     v1::GetStatsResponse* response) override {
    if (absl::Status s = TenantOf(*call, context_).status(); !s.ok()) return FinishNow(call, s);
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.GetStatus(
        FinishWith<EngineStatus>(reactor, [this, response](const EngineStatus& status) {
          *response->mutable_stats() = ToProto(status.cache);
          response->set_block_tokens(context_.engine_options.block_tokens);
          response->set_policy_version(Raw(status.policy_version));
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* Flush(grpc::CallbackServerContext* call, const v1::FlushRequest*,
                                  v1::FlushResponse* response) override {
    if (absl::Status s = TenantOf(*call, context_).status(); !s.ok()) return FinishNow(call, s);
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.FlushCache(FinishWith<int64_t>(reactor, [this, response](int64_t freed) {
      response->set_blocks_freed(freed);
      response->set_policy_version(Raw(context_.engine.policy_version()));
    }));
    return reactor;
  }

 private:
  const RpcContext& context_;
};

class AdminService final : public v1::Admin::CallbackService {
 public:
  explicit AdminService(const RpcContext& context) : context_(context) {}

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* call,
                                      const v1::GetStatusRequest*,
                                      v1::GetStatusResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.GetStatus(
        FinishWith<EngineStatus>(reactor, [this, response](const EngineStatus& status) {
          FillEngine(status, *response);
          FillFixed(*response);
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* Pause(grpc::CallbackServerContext* call,
                                  const v1::PauseRequest* request,
                                  v1::PauseResponse* response) override {
    absl::StatusOr<RunningRequests> running = FromProto(request->running(), RunningRequests::kKeep);
    if (!running.ok()) return FinishNow(call, At("pause refused: ", running.status()));
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.Pause(*running, request->abort(), FinishCount(reactor, response, true));
    return reactor;
  }

  grpc::ServerUnaryReactor* Resume(grpc::CallbackServerContext* call, const v1::ResumeRequest*,
                                   v1::ResumeResponse* response) override {
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.Resume(FinishCount(reactor, response, false));
    return reactor;
  }

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* call, const v1::DrainRequest*,
                                  v1::DrainResponse* response) override {
    context_.readiness.SetDraining();
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.Drain(FinishCount(reactor, response));
    return reactor;
  }

 private:
  // Once the engine has done it, and only then, readiness becomes `paused` if given.
  template <typename Response>
  Reply<int64_t> FinishCount(grpc::ServerUnaryReactor* reactor, Response* response,
                             std::optional<bool> paused = std::nullopt) const {
    return FinishWith<int64_t>(reactor, [this, response, paused](int64_t requests) {
      if (paused.has_value()) context_.readiness.SetPaused(*paused);
      response->set_requests(requests);
      response->set_policy_version(Raw(context_.engine.policy_version()));
    });
  }

  static v1::ServingState State(const EngineStatus& status) {
    if (status.draining) return v1::SERVING_STATE_DRAINING;
    return status.paused ? v1::SERVING_STATE_PAUSED : v1::SERVING_STATE_SERVING;
  }

  static void FillEngine(const EngineStatus& status, v1::GetStatusResponse& out) {
    out.set_device(status.device);
    out.set_state(State(status));
    out.set_policy_version(Raw(status.policy_version));
    out.set_pending_gradients(status.pending_gradients);
    out.set_optimizer_state(status.optimizer_state);
    out.set_queued_requests(status.queued_requests);
    out.set_running_requests(status.running_requests);
    out.set_running_samples(status.running_samples);
    out.set_rollouts(status.rollouts);
    *out.mutable_cache() = ToProto(status.cache);
  }

  void FillFixed(v1::GetStatusResponse& out) const {
    const EngineOptions& options = context_.engine_options;
    *out.mutable_model() = ToProto(context_.model.config, context_.model.tokenizer.get(),
                                   context_.model.chat_template);
    v1::ServerLimits* limits = out.mutable_limits();
    limits->set_max_context(options.max_context);
    limits->set_max_group_size(options.max_group_size);
    limits->set_max_queued_requests(options.max_queued_requests);
    limits->set_max_running_samples(options.max_running_samples);
    limits->set_max_batch_rows(options.max_batch_rows);
    limits->set_max_rollouts(options.max_rollouts);
    limits->set_max_message_bytes(context_.max_message_bytes);
    out.set_version(context_.version);
    out.set_block_tokens(options.block_tokens);
    for (const auto& [name, size_bytes] : context_.memory_plan) {
      v1::MemoryRegion* region = out.add_memory();
      region->set_name(name);
      region->set_size_bytes(size_bytes);
    }
    const absl::Duration uptime = context_.clock.Now() - context_.started_at;
    out.mutable_uptime()->set_seconds(absl::ToInt64Seconds(uptime));
  }

  const RpcContext& context_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewCacheService(const RpcContext& context) {
  return std::make_unique<CacheService>(context);
}

std::unique_ptr<grpc::Service> NewAdminService(const RpcContext& context) {
  return std::make_unique<AdminService>(context);
}

}  // namespace coppice
