// gRPC calls by method name and bytes, for services whose generated code Debian does not ship
// (health, reflection).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "kernels/base/check.h"

namespace coppice {

// One serialized request and the responses to it.
class RawStream {
 public:
  RawStream(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
            const std::string& request)
      : call_(grpc::GenericStub(channel).PrepareCall(&context_, method, &queue_)) {
    call_->StartCall(nullptr);
    Next();
    grpc::Slice slice(request);
    call_->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), nullptr);
    Next();
  }
  ~RawStream() {
    context_.TryCancel();
    grpc::Status status;
    call_->Finish(&status, nullptr);
    Next();
  }
  RawStream(const RawStream&) = delete;
  RawStream& operator=(const RawStream&) = delete;

  // The next response's bytes; empty if there is none.
  std::string Read() {
    grpc::ByteBuffer response;
    call_->Read(&response, nullptr);
    const bool got = Next();
    std::string bytes;
    std::vector<grpc::Slice> slices;
    if (got && response.Dump(&slices).ok()) {
      for (const grpc::Slice& part : slices) {
        bytes.append(reinterpret_cast<const char*>(part.begin()), part.size());
      }
    }
    return bytes;
  }

 private:
  bool Next() {
    void* tag = nullptr;
    bool ok = false;
    CHECK(queue_.Next(&tag, &ok));
    return ok;
  }

  grpc::ClientContext context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
};

// The first response's bytes; empty if there was none.
inline std::string RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                           const std::string& request) {
  return RawStream(channel, method, request).Read();
}

// HealthCheckResponse { ServingStatus status = 1; }, SERVING = 1, NOT_SERVING = 2
inline constexpr char kServing[] = "\x08\x01", kNotServing[] = "\x08\x02";

// grpc.health.v1: true if SERVING. `service` "" asks for the whole server.
inline bool HealthServing(const std::shared_ptr<grpc::Channel>& channel,
                          const std::string& service = "") {
  // HealthCheckRequest { string service = 1; }
  std::string request;
  if (!service.empty()) {
    request = {'\x0a', static_cast<char>(service.size())};
    request += service;
  }
  return RawCall(channel, "/grpc.health.v1.Health/Check", request) == kServing;
}

// grpc.reflection.v1alpha: the bytes of a ListServiceResponse, which contain the services' names.
inline std::string ListServices(const std::shared_ptr<grpc::Channel>& channel) {
  // ServerReflectionRequest { string list_services = 7; }
  return RawCall(channel, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                 "\x3a\x01*");
}

}  // namespace coppice
