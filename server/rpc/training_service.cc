#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "coppice/v1/training.grpc.pb.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/field_check.h"
#include "server/rpc/services.h"
#include "server/rpc/unary.h"

namespace coppice {
namespace {

// A plain name, and neither the daemon's own directory nor one that a save of another checkpoint
// writes first and removes (atomic_directory.h).
absl::Status CheckCheckpointName(absl::string_view field, absl::string_view name) {
  RETURN_IF_ERROR(CheckPlainName(field, name));
  if (name != kDurableSteps && !absl::EndsWith(name, ".partial")) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("neither ", kDurableSteps, " nor an end in .partial"),
                      name);
}

class TrainingService final : public v1::Training::CallbackService {
 public:
  explicit TrainingService(const RpcContext& context) : context_(context) {}

  grpc::ServerUnaryReactor* TrainStep(grpc::CallbackServerContext* call,
                                      const v1::TrainStepRequest* request,
                                      v1::TrainStepResponse* response) override {
    absl::StatusOr<TrainStepRequest> step = Translate(*call, "train step refused: ", *request);
    if (!step.ok()) return FinishNow(call, step.status());
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.TrainStep(*std::move(step), FillWith(reactor, response));
    return reactor;
  }

  grpc::ServerUnaryReactor* ForwardBackward(grpc::CallbackServerContext* call,
                                            const v1::ForwardBackwardRequest* request,
                                            v1::ForwardBackwardResponse* response) override {
    absl::StatusOr<TrainStepRequest> step =
        Translate(*call, "forward-backward refused: ", *request);
    if (!step.ok()) return FinishNow(call, step.status());
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.ForwardBackward(*std::move(step), FillWith(reactor, response));
    return reactor;
  }

  grpc::ServerUnaryReactor* OptimStep(grpc::CallbackServerContext* call,
                                      const v1::OptimStepRequest* request,
                                      v1::OptimStepResponse* response) override {
    absl::StatusOr<Tenant> tenant = TenantOf(*call, context_);
    if (!tenant.ok()) return FinishNow(call, tenant.status());
    absl::StatusOr<TrainStepRequest> step = FromProto(*request, *tenant);
    if (!step.ok()) return FinishNow(call, At("optimizer step refused: ", step.status()));
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.OptimStep(*std::move(step), FillWith(reactor, response));
    return reactor;
  }

  grpc::ServerUnaryReactor* SaveCheckpoint(grpc::CallbackServerContext* call,
                                           const v1::SaveCheckpointRequest* request,
                                           v1::SaveCheckpointResponse* response) override {
    absl::StatusOr<std::string> path = CheckpointPath(*call, request->name());
    if (!path.ok()) return FinishNow(call, path.status());
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.SaveCheckpoint(
        *path, FinishWith<PolicyVersion>(reactor, [response, path = *path](PolicyVersion version) {
          response->set_path(path);
          response->set_policy_version(Raw(version));
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* LoadCheckpoint(grpc::CallbackServerContext* call,
                                           const v1::LoadCheckpointRequest* request,
                                           v1::LoadCheckpointResponse* response) override {
    absl::StatusOr<std::string> path = CheckpointPath(*call, request->name());
    if (!path.ok()) return FinishNow(call, path.status());
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.LoadCheckpoint(
        *path, FinishWith<PolicyVersion>(reactor, [response](PolicyVersion version) {
          response->set_policy_version(Raw(version));
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* GetPolicy(grpc::CallbackServerContext* call,
                                      const v1::GetPolicyRequest*,
                                      v1::GetPolicyResponse* response) override {
    if (absl::Status s = TenantOf(*call, context_).status(); !s.ok()) return FinishNow(call, s);
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.GetStatus(
        FinishWith<EngineStatus>(reactor, [response](const EngineStatus& status) {
          response->set_policy_version(Raw(status.policy_version));
          response->set_num_parameters(status.num_parameters);
          response->set_optimizer_state(status.optimizer_state);
          response->set_pending_gradients(status.pending_gradients);
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* GetRollout(grpc::CallbackServerContext* call,
                                       const v1::GetRolloutRequest* request,
                                       v1::GetRolloutResponse* response) override {
    absl::StatusOr<Tenant> tenant = TenantOf(*call, context_);
    if (!tenant.ok()) return FinishNow(call, tenant.status());
    const absl::Status status = CheckRolloutId(request->rollout_id());
    if (!status.ok()) return FinishNow(call, At("rollout refused: ", status));
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.GetRollout(
        request->rollout_id(), tenant->salt,
        FinishWith<Rollout>(reactor, [this, response](const Rollout& rollout) {
          ToProto(rollout, response->mutable_rollout());
          response->set_policy_version(Raw(context_.engine.policy_version()));
        }));
    return reactor;
  }

  grpc::ServerUnaryReactor* PutRollout(grpc::CallbackServerContext* call,
                                       const v1::PutRolloutRequest* request,
                                       v1::PutRolloutResponse* response) override {
    absl::StatusOr<Tenant> tenant = TenantOf(*call, context_);
    if (!tenant.ok()) return FinishNow(call, tenant.status());
    absl::StatusOr<Rollout> rollout = FromProto(*request, *tenant, context_.limits());
    if (!rollout.ok()) return FinishNow(call, At("rollout refused: ", rollout.status()));
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.PutRollout(
        request->rollout_id(), *std::move(rollout),
        FinishWith<PolicyVersion>(reactor, [response](PolicyVersion version) {
          response->set_policy_version(Raw(version));
        }));
    return reactor;
  }

 private:
  template <typename Response>
  static Reply<TrainStepResult> FillWith(grpc::ServerUnaryReactor* reactor, Response* response) {
    return FinishWith<TrainStepResult>(
        reactor, [response](const TrainStepResult& result) { ToProto(result, response); });
  }

  template <typename Proto>
  absl::StatusOr<TrainStepRequest> Translate(const grpc::CallbackServerContext& call,
                                             absl::string_view refused, const Proto& proto) const {
    ASSIGN_OR_RETURN(const Tenant tenant, TenantOf(call, context_));
    absl::StatusOr<TrainStepRequest> step = FromProto(proto, tenant, context_.limits());
    if (!step.ok()) return At(refused, step.status());
    return step;
  }

  // A client names a checkpoint; where it lies is the operator's choice. Tenants share the policy
  // and therefore its checkpoints.
  absl::StatusOr<std::string> CheckpointPath(const grpc::CallbackServerContext& call,
                                             const std::string& name) const {
    RETURN_IF_ERROR(TenantOf(call, context_).status());
    const absl::Status status = CheckCheckpointName("name", name);
    if (!status.ok()) return At("checkpoint refused: ", status);
    if (context_.checkpoint_dir.empty()) {
      return absl::FailedPreconditionError(
          "checkpoint refused: want a checkpoint directory, got none; start coppiced with "
          "--checkpoint_dir");
    }
    return context_.checkpoint_dir + "/" + name;
  }

  const RpcContext& context_;
};

}  // namespace

std::unique_ptr<grpc::Service> NewTrainingService(const RpcContext& context) {
  return std::make_unique<TrainingService>(context);
}

}  // namespace coppice
