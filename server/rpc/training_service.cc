#include <utility>

#include "coppice/v1/training.grpc.pb.h"
#include "kernels/base/status_macros.h"
#include "server/rpc/field_check.h"
#include "server/rpc/services.h"
#include "server/rpc/unary.h"

namespace coppice {
namespace {

class TrainingService final : public v1::Training::CallbackService {
 public:
  explicit TrainingService(const RpcContext& context) : context_(context) {}

  grpc::ServerUnaryReactor* TrainStep(grpc::CallbackServerContext* call,
                                      const v1::TrainStepRequest* request,
                                      v1::TrainStepResponse* response) override {
    absl::StatusOr<TrainStepRequest> step = FromProto(*request, context_.limits());
    if (!step.ok()) return FinishNow(call, At("train step refused: ", step.status()));
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.TrainStep(*std::move(step), FillWith(reactor, response));
    return reactor;
  }

  grpc::ServerUnaryReactor* ForwardBackward(grpc::CallbackServerContext* call,
                                            const v1::ForwardBackwardRequest* request,
                                            v1::ForwardBackwardResponse* response) override {
    absl::StatusOr<TrainStepRequest> step = FromProto(*request, context_.limits());
    if (!step.ok()) return FinishNow(call, At("forward-backward refused: ", step.status()));
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.ForwardBackward(*std::move(step), FillWith(reactor, response));
    return reactor;
  }

  grpc::ServerUnaryReactor* OptimStep(grpc::CallbackServerContext* call,
                                      const v1::OptimStepRequest* request,
                                      v1::OptimStepResponse* response) override {
    absl::StatusOr<TrainStepRequest> step = FromProto(*request);
    if (!step.ok()) return FinishNow(call, At("optimizer step refused: ", step.status()));
    grpc::ServerUnaryReactor* reactor = call->DefaultReactor();
    context_.engine.OptimStep(*std::move(step), FillWith(reactor, response));
    return reactor;
  }

  grpc::ServerUnaryReactor* SaveCheckpoint(grpc::CallbackServerContext* call,
                                           const v1::SaveCheckpointRequest* request,
                                           v1::SaveCheckpointResponse* response) override {
    absl::StatusOr<std::string> path = CheckpointPath(request->name());
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
    absl::StatusOr<std::string> path = CheckpointPath(request->name());
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

 private:
  template <typename Response>
  static Reply<TrainStepResult> FillWith(grpc::ServerUnaryReactor* reactor, Response* response) {
    return FinishWith<TrainStepResult>(
        reactor, [response](const TrainStepResult& result) { ToProto(result, response); });
  }

  // A client names a checkpoint; where it lies is the operator's choice.
  absl::StatusOr<std::string> CheckpointPath(const std::string& name) const {
    const absl::Status status = CheckPlainName("name", name);
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
