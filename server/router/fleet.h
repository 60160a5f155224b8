// Fleet: the replicas as the router sees them: who exists, who may get requests, who leads, what
// is open where. Every decision of the router is made here, under one short lock; nothing here
// waits for the network.
//
// A replica is `joining` until it has told its model, then `serving` as long as it answers
// health checks with SERVING. `paused`: it answered NOT_SERVING and is not known to
// drain; if no replica serves it gets new calls, which wait in its queue. `not_ready`: it answered,
// but takes no calls (loading, draining); its open calls go on. `ejected`: it did not answer
// --eject_after times in a row, or its engine did not after a first byte was late; its open calls
// are cancelled, those without a byte of answer are tried elsewhere. `mismatched`: it serves
// another model than the leader and gets nothing until that changes.
//
// The leader is --leader, or the first replica by name of those found first: training goes there
// and nowhere else, since there is no other copy of the optimizer. It is never replaced, not when
// it is gone, nor by a name that comes later; a policy must not fork. Retained groups go to
// replicas with the leader's policy version only. While a call that may change it is open, and
// until the leader has been asked again, no other replica counts as one.
//
// Any thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/generic/generic_stub.h"
#include "kernels/base/clock.h"
#include "server/placement/placement.h"
#include "server/router/replica_address.h"
#include "server/router/router_metrics.h"

namespace coppice {

// One call to one replica while it is open. Shared by the call and by the fleet, which may cancel
// it.
struct OpenAttempt {
  enum class Cancelled { kNo, kEjected, kFirstByteLate };

  grpc::ClientContext context;
  bool takes_long = false;  // TakesLong(method); set before Opened
  absl::Duration started;
  std::atomic<bool> first_byte{false};
  std::atomic<Cancelled> cancelled{Cancelled::kNo};
};

// Where to call. Copies stay usable when the replica has left.
struct ReplicaTarget {
  ReplicaId id{0};
  std::string name;
  std::shared_ptr<grpc::Channel> channel;
};

// What a health check learnt.
struct ReplicaReport {
  enum class Health { kServing, kNotServing, kFailed };

  struct Facts {
    std::string model;  // equal iff the models are
    uint64_t policy_version = 0;
    int64_t cache_tokens = 0;
    absl::Duration uptime;
    bool draining = false;
  };

  Health health = Health::kFailed;
  uint64_t policy_epoch = 0;   // Fleet::policy_epoch() before it was asked for
  std::string error;           // of kFailed
  std::optional<Facts> facts;  // absent if it did not answer in time
};

class Fleet {
 public:
  struct Options {
    std::string leader;       // empty = the first by name of the first members
    int64_t eject_after = 3;  // failures in a row
    absl::Duration first_byte_timeout = absl::Seconds(300);  // 0 = none
    Placement::Options placement;
  };

  Fleet(const Options& options, RouterMetrics& metrics, const Clock& clock)
      : options_(options),
        metrics_(metrics),
        clock_(clock),
        placement_(options.placement),
        leader_name_(options.leader) {}
  ~Fleet();

  // ---- Membership and health; the watcher's threads
  // Replicas that are not in the list leave: their open calls go on.
  void SetMembers(const std::vector<ReplicaAddress>& members);
  std::vector<ReplicaTarget> Members() const;
  void Update(ReplicaId id, const ReplicaReport& report);
  // Cancels calls that wait for their first byte for too long, but for those that take long. Their
  // replicas are ejected if their engines do not answer the next question either; not while a call
  // that takes long is open there: it may hold the engine.
  void CancelLate();
  // FAILED_PRECONDITION naming two replicas with different models.
  absl::Status CheckModels() const;
  // INVALID_ARGUMENT if the leader is none of the members: for a list that does not change.
  absl::Status CheckLeader() const;

  // ---- Calls
  struct Choice {
    ReplicaTarget target;
    Placed placed;
    std::string home;  // its name
  };
  // UNAVAILABLE: no replica serves, or is paused if none serves, but those in request.except.
  absl::StatusOr<Choice> Place(const PlacementRequest& request);
  // The same among those that have the leader's policy. UNAVAILABLE: none of them serves.
  absl::StatusOr<Choice> PlaceRetained(PlacementRequest request);
  void Withdraw(const Placed& placed, absl::Span<const uint64_t> blocks);
  void Finish(const Placed& placed, double completion_tokens);
  // UNAVAILABLE: it does not serve. The name of the leader is in the message.
  absl::StatusOr<ReplicaTarget> Leader() const;
  std::string leader_name() const;
  // UNAVAILABLE: there is no such replica, or it does not answer health checks.
  absl::StatusOr<ReplicaTarget> Named(const std::string& name) const;
  // A call to the leader that may change its policy begins and has ended, however.
  void PolicyCallBegan();
  void PolicyCallEnded();
  // Rises with each of those ends.
  uint64_t policy_epoch() const;
  // For calls that any replica can answer: the least loaded.
  absl::StatusOr<ReplicaTarget> Any(absl::Span<const ReplicaId> except) const;
  // For calls to all: every replica that answers health checks, by name.
  std::vector<ReplicaTarget> Reachable() const;

  // Cancels the attempt if the replica was ejected since it was chosen.
  void Opened(ReplicaId id, const std::shared_ptr<OpenAttempt>& attempt);
  void Closed(ReplicaId id, const std::shared_ptr<OpenAttempt>& attempt);

  int64_t num_serving() const;
  // Whether a replica answers health checks, be it paused.
  bool AnyReachable() const;

 private:
  enum class State { kJoining, kServing, kPaused, kNotReady, kEjected, kMismatched };
  static const char* Name(State state);

  struct Replica {
    ReplicaAddress address;
    ReplicaId id{0};
    std::shared_ptr<grpc::Channel> channel;
    std::unique_ptr<RouterMetrics::Replica> metrics;
    State state = State::kJoining;
    int64_t failures = 0;  // in a row
    bool late = false;     // with a first byte, and its engine has not answered since
    std::optional<ReplicaReport::Facts> facts;
    absl::flat_hash_set<std::shared_ptr<OpenAttempt>> open;
  };
  using Attempts = std::vector<std::shared_ptr<OpenAttempt>>;

  static bool Answers(const Replica& replica);
  static bool MayHoldEngine(const Replica& replica);
  bool HasLeadersPolicy(const Replica& replica) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  Replica* Find(ReplicaId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<Choice> PlaceLocked(const PlacementRequest& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status LeaderMissing() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  const Replica* FindByName(const std::string& name) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  const Replica* FindLeader() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void LearnFacts(Replica& replica, const ReplicaReport::Facts& facts)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  State Judge(const Replica& replica, const ReplicaReport& report) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Enter(Replica& replica, State state, const std::string& why, Attempts& to_cancel)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // New calls go to those that serve; if none does, to those that are paused.
  void ChooseTakers() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void CountStates() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ShowLoad(ReplicaId id) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status NoneServes() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Outside the lock: gRPC may run a call's reactions on this stack.
  static void Cancel(const Attempts& attempts, OpenAttempt::Cancelled why);

  const Options options_;
  RouterMetrics& metrics_;
  const Clock& clock_;

  mutable absl::Mutex mutex_;
  Placement placement_ ABSL_GUARDED_BY(mutex_);
  std::vector<Replica> replicas_ ABSL_GUARDED_BY(mutex_);   // by name
  State takers_ ABSL_GUARDED_BY(mutex_) = State::kServing;  // the state of those that get calls
  std::string leader_name_ ABSL_GUARDED_BY(mutex_);         // once set, for good
  int64_t policy_calls_ ABSL_GUARDED_BY(mutex_) = 0;        // open
  uint64_t policy_epoch_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t leader_epoch_ ABSL_GUARDED_BY(mutex_) = 0;  // that the leader's facts are of
};

}  // namespace coppice
