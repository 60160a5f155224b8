#include "server/rpc/rpc_server.h"

#include <chrono>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "google/protobuf/stubs/logging.h"
#include "grpcpp/ext/proto_server_reflection_plugin.h"
#include "grpcpp/health_check_service_interface.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"

namespace coppice {
namespace {

constexpr const char* kServiceNames[] = {"coppice.v1.Generation", "coppice.v1.Training",
                                         "coppice.v1.Cache", "coppice.v1.Admin"};

constexpr int kMinPingIntervalMs = 15'000;

class GrpcServer final : public RpcServer {
 public:
  explicit GrpcServer(RpcContext context) : context_(std::move(context)) {
    services_.push_back(NewGenerationService(context_));
    services_.push_back(NewTrainingService(context_));
    services_.push_back(NewCacheService(context_));
    services_.push_back(NewAdminService(context_));
  }

  ~GrpcServer() override { Shutdown(absl::ZeroDuration()); }

  absl::Status Listen(const Options& options) {
    const std::string address = absl::StrCat(options.host, ":", options.port);
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port_);
    // Without this a second daemon would silently share the port.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    // A router or client may ask twice a minute whether the host is still there.
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                               kMinPingIntervalMs);
    builder.SetMaxReceiveMessageSize(static_cast<int>(context_.max_message_bytes));
    builder.SetMaxSendMessageSize(static_cast<int>(context_.max_message_bytes));
    for (const auto& service : services_) builder.RegisterService(service.get());
    server_ = builder.BuildAndStart();
    if (server_ != nullptr && port_ > 0) {
      SetServing(false);
      return absl::OkStatus();
    }
    return absl::UnavailableError(absl::StrCat(
        "rpc server did not start: want to listen on ", address,
        ", got port taken or no such address; stop the other process or change --port or --host"));
  }

  int port() const override { return port_; }

  void SetServing(bool serving) override {
    grpc::HealthCheckServiceInterface* health = server_->GetHealthCheckService();
    health->SetServingStatus("", serving);
    for (const char* name : kServiceNames) health->SetServingStatus(name, serving);
  }

  void Shutdown(absl::Duration grace) override {
    if (server_ == nullptr) return;
    server_->Shutdown(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(grace));
    server_->Wait();
    server_.reset();
  }

 private:
  const RpcContext context_;
  std::vector<std::unique_ptr<grpc::Service>> services_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Start(const Options& options,
                                                            RpcContext context) {
  // A client whose bytes do not parse is answered by gRPC; protobuf's lines would let it fill the
  // log.
  google::protobuf::SetLogHandler(nullptr);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  auto server = std::make_unique<GrpcServer>(std::move(context));
  const absl::Status status = server->Listen(options);
  if (!status.ok()) return status;
  return server;
}

}  // namespace coppice
