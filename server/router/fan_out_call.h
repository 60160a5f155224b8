// FanOutCall: one unary call of a client, sent to every reachable replica; the answers are merged
// into one. The first error, in order of the replicas' names, is the answer of all; what the others
// did stays done. A replica that is ejected ends its part with UNAVAILABLE.
//
// Owner: gRPC; deletes itself in OnDone. Threads: gRPC's; answers may arrive together.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/generic/generic_stub.h"
#include "server/router/call_context.h"

namespace coppice {

class FanOutCall final : public grpc::ServerGenericBidiReactor {
 public:
  FanOutCall(const RouterContext& context, grpc::GenericCallbackServerContext* call, Route route);
  ~FanOutCall() override;

  void OnReadDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override { delete this; }

 private:
  struct Leg {
    explicit Leg(ReplicaTarget t) : target(std::move(t)), stub(target.channel) {}
    const ReplicaTarget target;
    grpc::GenericStub stub;
    const std::shared_ptr<OpenAttempt> attempt = std::make_shared<OpenAttempt>();
    grpc::ByteBuffer answer;
    grpc::Status status;
  };

  void LegDone(Leg& leg, const grpc::Status& status);
  void Answer();
  void FinishWith(const grpc::Status& status);

  const RouterContext& context_;
  grpc::GenericCallbackServerContext* const call_;
  grpc::ByteBuffer request_, merged_;
  std::vector<std::unique_ptr<Leg>> legs_;  // fixed at construction, the leader's first
  std::atomic<size_t> open_legs_;
  std::atomic<bool> cancelled_{false};
};

}  // namespace coppice
