#include "server/router/rollout_fetch.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace coppice {

void RolloutFetch::Start() {
  const size_t lanes = std::min(kMaxOpen, rollouts_.size());
  {
    absl::MutexLock lock(&mutex_);
    lanes_ = lanes;
  }
  for (size_t i = 0; i < lanes; ++i) Next();
}

void RolloutFetch::Cancel() {
  std::vector<std::shared_ptr<OpenAttempt>> open;
  {
    absl::MutexLock lock(&mutex_);
    cancelled_ = true;
    open.assign(open_.begin(), open_.end());
  }
  for (const auto& attempt : open) attempt->context.TryCancel();
}

void RolloutFetch::Next() {
  for (;;) {
    const RolloutName* rollout = nullptr;
    Outcome outcome;
    {
      absl::MutexLock lock(&mutex_);
      if (next_ < rollouts_.size() && outcome_.refused.ok() && !cancelled_) {
        rollout = &rollouts_[next_++];
      } else if (--lanes_ > 0) {
        return;
      }
      outcome = outcome_;
    }
    if (rollout == nullptr) return done_(outcome);
    const absl::StatusOr<ReplicaTarget> home = context_.fleet.Named(rollout->replica);
    if (home.ok()) return Get(*rollout, *home);
    Missing(*rollout, ToGrpc(home.status()));
  }
}

void RolloutFetch::Get(const RolloutName& rollout, const ReplicaTarget& home) {
  Call(home, kGetRolloutMethod, GetRolloutRequestFor(rollout),
       [this, &rollout](const grpc::Status& status, const grpc::ByteBuffer& answer) {
         if (status.ok()) return Put(rollout, answer);
         Missing(rollout, status);
         Next();
       });
}

void RolloutFetch::Put(const RolloutName& rollout, const grpc::ByteBuffer& answer) {
  Call(leader_, kPutRolloutMethod, PutRolloutRequestFor(rollout, answer),
       [this, &rollout](const grpc::Status& status, const grpc::ByteBuffer&) {
         if (status.ok()) {
           context_.metrics.rollouts_fetched.Increment();
         } else {
           absl::MutexLock lock(&mutex_);
           outcome_.refused = {status.error_code(),
                               absl::StrCat("rollout not brought to the leader: ",
                                            rollout.ToString(), ": ", status.error_message())};
         }
         Next();
       });
}

void RolloutFetch::Call(const ReplicaTarget& target, const char* method,
                        const grpc::ByteBuffer& request, Then then) {
  const auto leg = std::make_shared<Leg>(target, request);
  PassOn(call_, leg->attempt->context);
  leg->attempt->takes_long = true;
  bool cancelled = false;
  {
    absl::MutexLock lock(&mutex_);
    open_.insert(leg->attempt);
    cancelled = cancelled_;
  }
  if (cancelled) leg->attempt->context.TryCancel();
  context_.fleet.Opened(target.id, leg->attempt);
  leg->stub.UnaryCall(
      &leg->attempt->context, method, {}, &leg->request, &leg->answer,
      [self = shared_from_this(), leg, then = std::move(then)](const grpc::Status& status) {
        self->context_.fleet.Closed(leg->target.id, leg->attempt);
        bool gone = false;
        {
          absl::MutexLock lock(&self->mutex_);
          self->open_.erase(leg->attempt);
          gone = self->cancelled_;
        }
        const grpc::Status meaning =
            Meaning(status, *leg->attempt, leg->target.name, gone, self->call_);
        if (meaning.error_code() == grpc::StatusCode::UNAVAILABLE) self->context_.watcher.Poke();
        then(meaning, leg->answer);
      });
}

void RolloutFetch::Missing(const RolloutName& rollout, const grpc::Status& status) {
  absl::MutexLock lock(&mutex_);
  if (!outcome_.missing.ok()) return;
  outcome_.missing = {
      status.error_code(),
      absl::StrCat("rollout not brought to the leader: want ", rollout.ToString(), " from ",
                   rollout.replica, ", which keeps it, got \"", status.error_message(),
                   "\"; repeat the call when it is back, or generate again")};
}

}  // namespace coppice
