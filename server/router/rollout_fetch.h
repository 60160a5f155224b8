// RolloutFetch: brings the rollouts that a step names from their homes to the leader, before the
// step goes there: GetRollout at the home, PutRollout with its answer at the leader, as bytes. At
// most kMaxOpen at a time, with the deadline and metadata of the step's call.
//
// What a home does not give may be at the leader already, or the step may be a repeat that needs no
// rollout: that is not known here, so the rest goes on. What the leader does not take ends it.
//
// Owner: shared by the call and by what is open. Threads: gRPC's; answers may arrive together.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/generic/generic_stub.h"
#include "server/router/call_context.h"
#include "server/router/training_routes.h"

namespace coppice {

class RolloutFetch final : public std::enable_shared_from_this<RolloutFetch> {
 public:
  static constexpr size_t kMaxOpen = 8;

  // OK, or the first failure of its kind.
  struct Outcome {
    grpc::Status missing;  // a home did not give one
    grpc::Status refused;  // the leader did not take one
  };

  // `call` lives until `done` is called, which happens once, after everything has ended, maybe
  // before Start returns. REQUIRES: `rollouts` is not empty.
  RolloutFetch(const RouterContext& context, const grpc::CallbackServerContext& call,
               ReplicaTarget leader, std::vector<RolloutName> rollouts,
               std::function<void(const Outcome&)> done)
      : context_(context),
        call_(call),
        leader_(std::move(leader)),
        rollouts_(std::move(rollouts)),
        done_(std::move(done)) {}

  void Start();
  // The caller is gone. Any thread, also before Start and after the end.
  void Cancel();

 private:
  // One unary call to one replica.
  struct Leg {
    Leg(ReplicaTarget t, const grpc::ByteBuffer& r)
        : target(std::move(t)), stub(target.channel), request(r) {}
    const ReplicaTarget target;
    grpc::GenericStub stub;
    const std::shared_ptr<OpenAttempt> attempt = std::make_shared<OpenAttempt>();
    const grpc::ByteBuffer request;
    grpc::ByteBuffer answer;
  };
  using Then = std::function<void(const grpc::Status& status, const grpc::ByteBuffer& answer)>;

  // The next rollout, for a lane that has none; the last lane without one ends the fetch.
  void Next();
  void Get(const RolloutName& rollout, const ReplicaTarget& home);
  void Put(const RolloutName& rollout, const grpc::ByteBuffer& answer);
  void Call(const ReplicaTarget& target, const char* method, const grpc::ByteBuffer& request,
            Then then);
  void Missing(const RolloutName& rollout, const grpc::Status& status);

  const RouterContext& context_;
  const grpc::CallbackServerContext& call_;
  const ReplicaTarget leader_;
  const std::vector<RolloutName> rollouts_;
  const std::function<void(const Outcome&)> done_;

  absl::Mutex mutex_;
  size_t next_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t lanes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  Outcome outcome_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_set<std::shared_ptr<OpenAttempt>> open_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace coppice
