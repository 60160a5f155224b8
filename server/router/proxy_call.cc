#include "server/router/proxy_call.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "server/placement/prefix_hash.h"

namespace coppice {
namespace {

constexpr char kTenantHeader[] = "x-coppice-tenant";
}  // namespace

void ProxyCall::Upstream::Start(const std::string& method, const grpc::ByteBuffer& request) {
  request_ = request;
  PassOn(*call_.call_, attempt_->context);
  attempt_->takes_long = TakesLong(method);
  call_.context_.fleet.Opened(target_.id, attempt_);
  stub_.PrepareBidiStreamingCall(&attempt_->context, method, {}, this);
  // Reads are started by the caller's reactions too: without the hold OnDone might come between.
  AddHold();
  StartWriteLast(&request_, {});
  StartRead(&call_.message_);
  StartCall();
}

void ProxyCall::Upstream::OnReadDone(bool ok) {
  if (ok) return call_.OnMessage();
  RemoveHold();
}

ProxyCall::ProxyCall(const RouterContext& context, grpc::GenericCallbackServerContext* call,
                     Route route)
    : context_(context), call_(call), route_(route), arrived_(context.clock.Now()) {
  context_.metrics.open_requests.Increment();
  context_.metrics.requests[static_cast<int>(route)]->Increment();
  StartRead(&request_);
}

ProxyCall::~ProxyCall() { context_.metrics.open_requests.Decrement(); }

void ProxyCall::OnReadDone(bool ok) {
  if (!ok) {
    return End({grpc::StatusCode::INVALID_ARGUMENT,
                "call refused: want one request message, got none; use a client of coppice.v1"});
  }
  const absl::Status status = ReadRequest();
  if (!status.ok()) return End(ToGrpc(status));
  if (training_.elsewhere.empty()) return Attempt();
  FetchRollouts();
}

absl::Status ProxyCall::ReadRequest() {
  if (route_ == Route::kTraining) {
    ASSIGN_OR_RETURN(training_,
                     ReadTraining(call_->method(), context_.fleet.leader_name(), request_));
    if (training_.changes_policy) context_.fleet.PolicyCallBegan();
    return absl::OkStatus();
  }
  if (route_ == Route::kGenerationOther) return absl::OkStatus();
  uint64_t hash = 0;
  const bool given = PrefixHashFromHeader(Header(*call_, kPrefixHashHeader), &hash);
  const std::string tenant = context_.trust_tenant_header ? Header(*call_, kTenantHeader) : "";
  ASSIGN_OR_RETURN(facts_, ReadPlacementFacts(route_, request_, tenant,
                                              given ? std::make_optional(hash) : std::nullopt));
  return absl::OkStatus();
}

void ProxyCall::FetchRollouts() {
  absl::StatusOr<ReplicaTarget> leader = context_.fleet.Leader();
  if (!leader.ok()) return End(ToGrpc(leader.status()));
  // As with an attempt: nothing of this is touched after Start.
  const auto fetch = std::make_shared<RolloutFetch>(
      context_, *call_, *std::move(leader), training_.elsewhere,
      [this](const RolloutFetch::Outcome& outcome) { OnFetched(outcome); });
  bool cancelled = false;
  {
    absl::MutexLock lock(&mutex_);
    fetch_ = fetch;
    cancelled = cancelled_;
  }
  if (cancelled) fetch->Cancel();
  fetch->Start();
}

void ProxyCall::OnFetched(const RolloutFetch::Outcome& outcome) {
  if (!outcome.refused.ok()) return End(outcome.refused);
  missing_ = outcome.missing;
  Attempt();
}

absl::StatusOr<ReplicaTarget> ProxyCall::Choose() {
  if (!training_.replica.empty()) return context_.fleet.Named(training_.replica);
  if (route_ == Route::kTraining) return context_.fleet.Leader();
  if (route_ == Route::kGenerationOther) return context_.fleet.Any(tried_);
  return ChooseByPlacement();
}

absl::StatusOr<ReplicaTarget> ProxyCall::ChooseByPlacement() {
  const absl::Duration began = context_.clock.Now();
  const PlacementRequest request{.prefix_hash = facts_->prefix_hash,
                                 .blocks = facts_->blocks,
                                 .prompt_tokens = facts_->prompt_tokens,
                                 .session = facts_->session,
                                 .n = facts_->n,
                                 .max_tokens = facts_->max_tokens,
                                 .except = tried_};
  ASSIGN_OR_RETURN(choice_, facts_->retain ? context_.fleet.PlaceRetained(request)
                                           : context_.fleet.Place(request));
  context_.metrics.placement_seconds.Observe(absl::ToDoubleSeconds(context_.clock.Now() - began));
  return choice_->target;
}

void ProxyCall::Attempt() {
  const absl::StatusOr<ReplicaTarget> target = Choose();
  if (!target.ok()) return End(last_status_.ok() ? ToGrpc(target.status()) : last_status_);
  tried_.push_back(target->id);
  upstream_ = std::make_unique<Upstream>(*this, *target);
  // A call that is done may be deleted by another thread: nothing of it is touched after Start.
  const std::shared_ptr<OpenAttempt> attempt = upstream_->attempt();
  bool cancelled = false;
  {
    absl::MutexLock lock(&mutex_);
    open_ = attempt;
    cancelled = cancelled_;
  }
  if (cancelled) attempt->context.TryCancel();
  upstream_->Start(call_->method(), request_);
}

void ProxyCall::OnMessage() {
  if (!upstream_->attempt()->first_byte) OnFirstMessage();
  if (route_ == Route::kGenerate) {
    const EventFacts event = ReadEvent(message_);
    if (event.started) {
      context_.metrics.prompt_tokens.Increment(static_cast<double>(event.prompt_tokens));
      context_.metrics.hit_tokens_confirmed.Increment(static_cast<double>(event.hit_tokens));
      context_.metrics.hit_tokens_predicted.Increment(
          static_cast<double>(choice_->placed.predicted_hit_tokens));
    }
    if (event.group) {
      completion_tokens_ = event.completion_tokens;
      const RolloutName rollout{event.rollout_id, upstream_->target().name};
      AddToGroup(event.rollout_id.empty() ? "" : rollout.ToString(), Explain(), message_);
    }
  }
  StartWrite(&message_);
}

void ProxyCall::OnFirstMessage() {
  upstream_->attempt()->first_byte = true;
  request_.Clear();
  context_.metrics.time_to_first_byte_seconds.Observe(
      absl::ToDoubleSeconds(context_.clock.Now() - arrived_));
}

void ProxyCall::OnWriteDone(bool ok) {
  if (!ok) OnCancel();  // the caller is gone, whatever gRPC says first
  upstream_->ReadNext();
}

void ProxyCall::OnCancel() {
  std::shared_ptr<OpenAttempt> open;
  std::shared_ptr<RolloutFetch> fetch;
  {
    absl::MutexLock lock(&mutex_);
    cancelled_ = true;
    open = open_;
    fetch = fetch_;
  }
  if (open != nullptr) open->context.TryCancel();
  if (fetch != nullptr) fetch->Cancel();
}

void ProxyCall::OnUpstreamDone(const grpc::Status& upstream_status) {
  // It is on the stack: it goes when this returns, and `this` may be gone by then.
  const std::unique_ptr<Upstream> upstream = std::move(upstream_);
  const std::shared_ptr<OpenAttempt> attempt = upstream->attempt();
  context_.fleet.Closed(upstream->target().id, attempt);
  const grpc::Status status = Meaning(upstream_status, *upstream);
  const bool answered = attempt->first_byte;
  SettlePlacement(answered);
  if (status.error_code() == grpc::StatusCode::UNAVAILABLE) context_.watcher.Poke();
  if (MayRetry(status, answered)) {
    context_.metrics.retries.Increment();
    LOG(WARNING) << "retry attempt=" << tried_.size() + 1 << " replica=" << upstream->target().name
                 << " method=" << call_->method() << " error=\"" << status.error_message() << '"';
    last_status_ = status;
    return Attempt();
  }
  PassBack(attempt->context, *call_);
  // Without one that no home gave, the leader may still know the step, or the rollout.
  const bool missed = status.error_code() == grpc::StatusCode::NOT_FOUND && !missing_.ok();
  End(missed ? missing_ : status);
}

grpc::Status ProxyCall::Meaning(const grpc::Status& status, const Upstream& upstream) {
  absl::MutexLock lock(&mutex_);
  return coppice::Meaning(status, *upstream.attempt(), upstream.target().name, cancelled_, *call_);
}

void ProxyCall::SettlePlacement(bool answered) {
  if (!choice_) return;
  const double mean = completion_tokens_ < 0 ? -1
                                             : static_cast<double>(completion_tokens_) /
                                                   static_cast<double>(facts_->n);
  if (!answered) context_.fleet.Withdraw(choice_->placed, facts_->blocks);
  context_.fleet.Finish(choice_->placed, mean);
}

bool ProxyCall::MayRetry(const grpc::Status& status, bool answered) {
  if (status.error_code() != grpc::StatusCode::UNAVAILABLE || answered) return false;
  if (route_ == Route::kTraining) return false;
  if (tried_.size() >= kMaxAttempts) return false;
  absl::MutexLock lock(&mutex_);
  return !cancelled_;
}

std::optional<Explanation> ProxyCall::Explain() const {
  if (!facts_->explain) return std::nullopt;
  const Placed& placed = choice_->placed;
  return Explanation{.replica = choice_->target.name,
                     .home = choice_->home,
                     .by = placed.by,
                     .prefix_hash = facts_->prefix_hash,
                     .predicted_hit_tokens = placed.predicted_hit_tokens,
                     .load = placed.load,
                     .charge = placed.charge,
                     .attempts = static_cast<int>(tried_.size())};
}

void ProxyCall::End(const grpc::Status& status) {
  CountResponse(context_.metrics, status);
  if (training_.changes_policy) {
    context_.fleet.PolicyCallEnded();
    context_.watcher.Poke();
  }
  Finish(status);
}

}  // namespace coppice
