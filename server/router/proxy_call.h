// ProxyCall: one call of a client, passed on to one replica and its answers back, as bytes.
//
//   request read -> facts for placement -> attempt: call to a replica, request written once
//                   facts for training -> rollouts brought to the leader -> attempt
//   each answer:  upstream read -> downstream write -> the next upstream read
//   end:          upstream done -> try elsewhere, or Finish with its status and metadata
//
// Nothing is buffered: at most one message is between the two connections, so a slow reader slows
// its replica, and what it can hold is that message and the two connections' windows. A caller that
// is gone cancels the replica's call; a replica that is gone ends the caller's.
//
// Another replica is tried only before the first byte of an answer and only after UNAVAILABLE, at
// most kMaxAttempts times in all; for training never, since only one will do.
//
// Owner: gRPC; deletes itself in OnDone. Threads: gRPC's, one reaction at a time but for OnCancel.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/generic/generic_stub.h"
#include "server/router/call_context.h"
#include "server/router/rollout_fetch.h"
#include "server/router/training_routes.h"

namespace coppice {

class ProxyCall final : public grpc::ServerGenericBidiReactor {
 public:
  static constexpr int kMaxAttempts = 3;

  ProxyCall(const RouterContext& context, grpc::GenericCallbackServerContext* call, Route route);
  ~ProxyCall() override;

  // ---- gRPC's reactions
  void OnReadDone(bool ok) override;
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override { delete this; }

 private:
  // The call to one replica.
  class Upstream final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
   public:
    Upstream(ProxyCall& call, ReplicaTarget target)
        : call_(call), target_(std::move(target)), stub_(target_.channel) {}

    void Start(const std::string& method, const grpc::ByteBuffer& request);
    void ReadNext() { StartRead(&call_.message_); }
    const ReplicaTarget& target() const { return target_; }
    const std::shared_ptr<OpenAttempt>& attempt() const { return attempt_; }

    void OnReadDone(bool ok) override;
    void OnDone(const grpc::Status& status) override { call_.OnUpstreamDone(status); }

   private:
    ProxyCall& call_;
    const ReplicaTarget target_;
    grpc::GenericStub stub_;
    const std::shared_ptr<OpenAttempt> attempt_ = std::make_shared<OpenAttempt>();
    grpc::ByteBuffer request_;
  };

  absl::Status ReadRequest();
  absl::StatusOr<ReplicaTarget> Choose();
  absl::StatusOr<ReplicaTarget> ChooseByPlacement();
  void FetchRollouts();
  void OnFetched(const RolloutFetch::Outcome& outcome);
  void Attempt();
  void OnMessage();
  void OnFirstMessage();
  void OnUpstreamDone(const grpc::Status& status);
  // UNAVAILABLE for what a replica's end or the fleet did to the call.
  grpc::Status Meaning(const grpc::Status& status, const Upstream& upstream);
  void SettlePlacement(bool answered);
  bool MayRetry(const grpc::Status& status, bool answered);
  std::optional<Explanation> Explain() const;
  void End(const grpc::Status& status);

  const RouterContext& context_;
  grpc::GenericCallbackServerContext* const call_;
  const Route route_;
  const absl::Duration arrived_;
  grpc::ByteBuffer request_;  // kept until the first byte of an answer
  grpc::ByteBuffer message_;  // the one on its way
  std::unique_ptr<Upstream> upstream_;
  std::vector<ReplicaId> tried_;
  grpc::Status last_status_;

  std::optional<PlacementFacts> facts_;  // of a placed route
  std::optional<Fleet::Choice> choice_;  // of the attempt
  int64_t completion_tokens_ = -1;       // of all samples, once the group has finished
  TrainingFacts training_;               // of Route::kTraining
  grpc::Status missing_;                 // of the rollouts that the call needs

  absl::Mutex mutex_;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  std::shared_ptr<OpenAttempt> open_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<RolloutFetch> fetch_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace coppice
