#include "server/router/router.h"

#include <chrono>

#include "absl/strings/str_cat.h"
#include "google/protobuf/stubs/logging.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "kernels/base/status_macros.h"
#include "server/router/fan_out_call.h"
#include "server/router/proxy_call.h"

namespace coppice {
namespace {

// A method that the API does not have.
class UnknownCall final : public grpc::ServerGenericBidiReactor {
 public:
  UnknownCall(RouterMetrics& metrics, const std::string& method) {
    const grpc::Status status(grpc::StatusCode::UNIMPLEMENTED,
                              absl::StrCat("call refused: want a method of coppice.v1, got ",
                                           method, "; see proto/coppice/v1"));
    CountResponse(metrics, status);
    Finish(status);
  }
  void OnDone() override { delete this; }
};

class GrpcRouter final : public Router, public grpc::CallbackGenericService {
 public:
  GrpcRouter(const Options& options, RouterMetrics& metrics, const Clock& clock)
      : metrics_(metrics),
        fleet_(options.fleet, metrics, clock),
        watcher_(options.watcher, fleet_, metrics, clock, [this] { ShowHealth(); }),
        context_{fleet_, watcher_, metrics, clock, options.trust_tenant_header} {}

  ~GrpcRouter() override { Shutdown(absl::ZeroDuration()); }

  absl::Status Listen(const Options& options) {
    const std::string address = absl::StrCat(options.host, ":", options.port);
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port_);
    // Without this a second router would silently share the port.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
    builder.SetMaxSendMessageSize(-1);
    builder.RegisterCallbackGenericService(this);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr || port_ <= 0) {
      return absl::AlreadyExistsError(absl::StrCat("router did not start: want to listen on ",
                                                   address,
                                                   ", got port taken or no such address; stop the "
                                                   "other process or change --port or --host"));
    }
    ShowHealth();
    return absl::OkStatus();
  }
  absl::Status FindReplicas() { return watcher_.Start(); }

  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext* call) override {
    const Route route = RouteOf(call->method());
    if (route == Route::kUnknown) {
      metrics_.requests[static_cast<int>(route)]->Increment();
      return new UnknownCall(metrics_, call->method());
    }
    if (IsFanOut(call->method())) return new FanOutCall(context_, call, route);
    return new ProxyCall(context_, call, route);
  }

  int port() const override { return port_; }
  int64_t num_serving() const override { return fleet_.num_serving(); }
  std::string NotReadyReason() const override {
    if (draining_) return "draining";
    return fleet_.AnyReachable() ? "" : "no_replica";
  }
  void SetDraining() override {
    draining_ = true;
    ShowHealth();
  }

  bool Shutdown(absl::Duration grace) override {
    if (server_ == nullptr) return true;
    const auto deadline = std::chrono::system_clock::now() + absl::ToChronoMilliseconds(grace);
    server_->Shutdown(deadline);
    const bool in_time =
        grace == absl::ZeroDuration() || std::chrono::system_clock::now() < deadline;
    server_->Wait();
    watcher_.Stop();
    server_.reset();
    return in_time;
  }

 private:
  void ShowHealth() {
    if (server_ != nullptr)
      server_->GetHealthCheckService()->SetServingStatus(NotReadyReason().empty());
  }

  RouterMetrics& metrics_;
  Fleet fleet_;
  Watcher watcher_;
  const RouterContext context_;
  std::atomic<bool> draining_{false};
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Router>> Router::Start(const Options& options,
                                                      RouterMetrics& metrics, const Clock& clock) {
  // What does not parse is answered; protobuf's lines would let a client fill the log.
  google::protobuf::SetLogHandler(nullptr);
  grpc::EnableDefaultHealthCheckService(true);
  auto router = std::make_unique<GrpcRouter>(options, metrics, clock);
  RETURN_IF_ERROR(router->Listen(options));
  RETURN_IF_ERROR(router->FindReplicas());
  return router;
}

}  // namespace coppice
