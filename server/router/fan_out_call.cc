#include "server/router/fan_out_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace coppice {

FanOutCall::FanOutCall(const RouterContext& context, grpc::GenericCallbackServerContext* call,
                       Route route)
    : context_(context), call_(call) {
  context_.metrics.open_requests.Increment();
  context_.metrics.requests[static_cast<int>(route)]->Increment();
  for (const ReplicaTarget& target : context_.fleet.Reachable()) {
    legs_.push_back(std::make_unique<Leg>(target));
    PassOn(*call_, legs_.back()->attempt->context);
    legs_.back()->attempt->takes_long = TakesLong(call_->method());
  }
  open_legs_ = legs_.size();
  StartRead(&request_);
}

FanOutCall::~FanOutCall() { context_.metrics.open_requests.Decrement(); }

void FanOutCall::OnReadDone(bool ok) {
  if (!ok) {
    return FinishWith({grpc::StatusCode::INVALID_ARGUMENT,
                       "call refused: want one request message, got none; use a client of "
                       "coppice.v1"});
  }
  if (legs_.empty()) {
    return FinishWith({grpc::StatusCode::UNAVAILABLE,
                       "no replica answers: want at least one, got none; retry later"});
  }
  // The last answer may delete this while the loop runs: it works on copies.
  std::vector<Leg*> legs;
  for (const auto& leg : legs_) legs.push_back(leg.get());
  const std::string method = call_->method();
  Fleet& fleet = context_.fleet;
  for (Leg* leg : legs) {
    fleet.Opened(leg->target.id, leg->attempt);
    leg->stub.UnaryCall(&leg->attempt->context, method, {}, &request_, &leg->answer,
                        [this, leg](const grpc::Status& status) { LegDone(*leg, status); });
  }
}

void FanOutCall::OnCancel() {
  cancelled_ = true;
  for (const auto& leg : legs_) leg->attempt->context.TryCancel();
}

void FanOutCall::LegDone(Leg& leg, const grpc::Status& status) {
  context_.fleet.Closed(leg.target.id, leg.attempt);
  leg.status = Meaning(status, *leg.attempt, leg.target.name, cancelled_, *call_);
  if (leg.status.error_code() == grpc::StatusCode::UNAVAILABLE) context_.watcher.Poke();
  if (open_legs_.fetch_sub(1) == 1) Answer();
}

void FanOutCall::Answer() {
  std::vector<grpc::ByteBuffer> answers;
  answers.reserve(legs_.size());
  for (const auto& leg : legs_) {
    const grpc::Status& status = leg->status;
    if (status.ok()) {
      answers.push_back(leg->answer);
      continue;
    }
    if (status.error_code() == grpc::StatusCode::UNAVAILABLE) return FinishWith(status);  // named
    return FinishWith({status.error_code(),
                       absl::StrCat("replica ", leg->target.name, ": ", status.error_message())});
  }
  absl::StatusOr<grpc::ByteBuffer> merged = Merge(call_->method(), answers);
  if (!merged.ok()) return FinishWith(ToGrpc(merged.status()));
  merged_ = *std::move(merged);
  CountResponse(context_.metrics, grpc::Status::OK);
  StartWriteAndFinish(&merged_, {}, grpc::Status::OK);
}

void FanOutCall::FinishWith(const grpc::Status& status) {
  CountResponse(context_.metrics, status);
  Finish(status);
}

}  // namespace coppice
