#include "server/router/call_context.h"

#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"

namespace coppice {
namespace {

bool StartsWith(const grpc::string_ref& text, const char* prefix) {
  return text.starts_with(prefix);
}

// Made anew by each connection.
bool BelongsToOneHop(const grpc::string_ref& key) {
  static constexpr const char* kKeys[] = {"user-agent", "accept-encoding", "content-type", "te",
                                          "host"};
  return StartsWith(key, "grpc-") || StartsWith(key, ":") ||
         std::any_of(std::begin(kKeys), std::end(kKeys), [&](const char* k) { return key == k; });
}

std::string ToString(const grpc::string_ref& text) { return {text.data(), text.size()}; }

// Index in kCodeLabels.
int CodeIndex(grpc::StatusCode code) {
  switch (code) {
    case grpc::StatusCode::OK:
      return 0;
    case grpc::StatusCode::UNAVAILABLE:
      return 2;
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return 3;
    case grpc::StatusCode::CANCELLED:
      return 4;
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return 5;
    case grpc::StatusCode::INTERNAL:
    case grpc::StatusCode::UNKNOWN:
    case grpc::StatusCode::DATA_LOSS:
      return 6;
    default:
      return 1;
  }
}

// The daemon's clock may fire first by so much.
constexpr std::chrono::milliseconds kDeadlineSlack(50);

// Of a call that neither its caller nor the daemon's engine ended.
grpc::Status CancelledStatus(OpenAttempt::Cancelled why, const std::string& replica) {
  const char* got = why == OpenAttempt::Cancelled::kEjected ? "no answer to health checks"
                    : why == OpenAttempt::Cancelled::kFirstByteLate
                        ? "no byte in --first_byte_timeout_s"
                        : "its shutdown";
  return {grpc::StatusCode::UNAVAILABLE, absl::StrCat("call ended: want an answer of replica ",
                                                      replica, ", got ", got, "; try again")};
}

// A server that shuts down cancels what reaches it late, with no words of its own; a daemon that
// means CANCELLED says what was cancelled.
bool IsShutdown(const grpc::Status& status) {
  return status.error_code() == grpc::StatusCode::CANCELLED &&
         (status.error_message().empty() || status.error_message() == "CANCELLED");
}

}  // namespace

std::string Header(const grpc::CallbackServerContext& call, const std::string& key) {
  const auto found = call.client_metadata().find(key);
  return found == call.client_metadata().end() ? "" : ToString(found->second);
}

void PassOn(const grpc::CallbackServerContext& call, grpc::ClientContext& upstream) {
  upstream.set_deadline(call.deadline());
  for (const auto& [key, value] : call.client_metadata()) {
    if (!BelongsToOneHop(key)) upstream.AddMetadata(ToString(key), ToString(value));
  }
}

void PassBack(const grpc::ClientContext& upstream, grpc::CallbackServerContext& call) {
  for (const auto& [key, value] : upstream.GetServerTrailingMetadata()) {
    if (!BelongsToOneHop(key)) call.AddTrailingMetadata(ToString(key), ToString(value));
  }
}

grpc::Status ToGrpc(const absl::Status& status) {
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

grpc::Status Meaning(const grpc::Status& status, const OpenAttempt& attempt,
                     const std::string& replica, bool caller_gone,
                     const grpc::CallbackServerContext& call) {
  if (status.ok()) return status;
  const OpenAttempt::Cancelled why = attempt.cancelled;
  // A daemon that ends a call at its deadline sounds the same.
  const bool in_time = call.deadline() > std::chrono::system_clock::now() + kDeadlineSlack;
  const bool shut_down = IsShutdown(status) && !caller_gone && in_time;
  if (why != OpenAttempt::Cancelled::kNo || shut_down) return CancelledStatus(why, replica);
  if (status.error_code() != grpc::StatusCode::UNAVAILABLE) return status;
  // Without the name a caller would take the router for what is gone.
  return {status.error_code(), absl::StrCat("replica ", replica, ": ", status.error_message()),
          status.error_details()};
}

void CountResponse(RouterMetrics& metrics, const grpc::Status& status) {
  metrics.responses[CodeIndex(status.error_code())]->Increment();
}

}  // namespace coppice
