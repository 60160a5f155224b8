// One gRPC call by method name and bytes, for services whose generated code Debian does not ship
// (health, reflection).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "kernels/base/check.h"

namespace coppice {

// Sends one serialized request and returns the first response's bytes; empty if there was none.
inline std::string RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                           const std::string& request) {
  grpc::CompletionQueue queue;
  const auto next = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    CHECK(queue.Next(&tag, &ok));
    return ok;
  };
  grpc::ClientContext context;
  auto call = grpc::GenericStub(channel).PrepareCall(&context, method, &queue);
  call->StartCall(nullptr);
  next();
  grpc::Slice slice(request);
  call->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), nullptr);
  next();
  grpc::ByteBuffer response;
  call->Read(&response, nullptr);
  const bool got = next();
  grpc::Status status;
  call->Finish(&status, nullptr);
  next();
  std::string bytes;
  std::vector<grpc::Slice> slices;
  if (got && response.Dump(&slices).ok()) {
    for (const grpc::Slice& part : slices) {
      bytes.append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
  }
  return bytes;
}

// grpc.health.v1: true if SERVING. `service` "" asks for the whole server.
inline bool HealthServing(const std::shared_ptr<grpc::Channel>& channel,
                          const std::string& service = "") {
  // HealthCheckRequest { string service = 1; }, HealthCheckResponse { ServingStatus status = 1; },
  // SERVING = 1
  std::string request;
  if (!service.empty()) {
    request = {'\x0a', static_cast<char>(service.size())};
    request += service;
  }
  return RawCall(channel, "/grpc.health.v1.Health/Check", request) == "\x08\x01";
}

// grpc.reflection.v1alpha: the bytes of a ListServiceResponse, which contain the services' names.
inline std::string ListServices(const std::shared_ptr<grpc::Channel>& channel) {
  // ServerReflectionRequest { string list_services = 7; }
  return RawCall(channel, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                 "\x3a\x01*");
}

}  // namespace coppice
