// The only translation between proto/coppice/v1 and the native types. Pure functions; any thread.
//
// From-functions answer INVALID_ARGUMENT naming field, want and got for what the wire can say and
// the native types cannot (unknown enum values, contradicting fields, names unfit for a log) and
// for training requests as a whole, so that a bad one is refused before running requests are
// drained for it. The ranges of a Generate request are checked by Engine::Submit, on the same
// thread (server/engine/validate.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "coppice/v1/admin.pb.h"
#include "coppice/v1/cache.pb.h"
#include "coppice/v1/generation.pb.h"
#include "coppice/v1/training.pb.h"
#include "grpcpp/support/status.h"
#include "kernels/model/model_config.h"
#include "kernels/model/tokenizer.h"
#include "server/engine/engine.h"
#include "server/engine/request.h"
#include "trainer/train_types.h"

namespace coppice {

// What a client's bytes are checked against.
struct RequestLimits {
  int64_t vocab = 0;
  int64_t max_context = 0;
  int64_t max_group_size = 0;
  const Tokenizer* tokenizer = nullptr;  // null: text is refused with FAILED_PRECONDITION
};

// Who calls, from the connection and never from a message. `salt` separates cached prompts and
// rollouts, `prefix` the names of requests, sessions and steps.
struct Tenant {
  std::string salt;
  std::string prefix;  // "" or "<tenant>/"
};

// grpc's codes have absl's numbers.
grpc::Status ToGrpcStatus(const absl::Status& status);

// ---- Generation
absl::StatusOr<GenerateRequest> FromProto(const v1::GenerateRequest& proto, const Tenant& tenant,
                                          const RequestLimits& limits);
absl::StatusOr<GenerateRequest> FromProto(const v1::WarmRequest& proto, const Tenant& tenant,
                                          const RequestLimits& limits);
absl::StatusOr<ScoreRequest> FromProto(const v1::ScoreRequest& proto, const Tenant& tenant,
                                       const RequestLimits& limits);
struct AbortCall {
  std::string request_id, session_id;  // one of them is empty
};
absl::StatusOr<AbortCall> FromProto(const v1::AbortRequest& proto, const Tenant& tenant);

v1::Usage ToProto(const Usage& usage);
v1::TokenChunk ToProto(const TokenChunk& chunk);
v1::Finished ToProto(const SampleFinished& finished);

// ---- Training
absl::StatusOr<TrainStepRequest> FromProto(const v1::TrainStepRequest& proto, const Tenant& tenant,
                                           const RequestLimits& limits);
absl::StatusOr<TrainStepRequest> FromProto(const v1::ForwardBackwardRequest& proto,
                                           const Tenant& tenant, const RequestLimits& limits);
absl::StatusOr<TrainStepRequest> FromProto(const v1::OptimStepRequest& proto, const Tenant& tenant);
void ToProto(const TrainStepResult& result, v1::TrainStepResponse* proto);
void ToProto(const TrainStepResult& result, v1::ForwardBackwardResponse* proto);
void ToProto(const TrainStepResult& result, v1::OptimStepResponse* proto);

absl::Status CheckRolloutId(absl::string_view id);
// Everything that a rollout generated here would fulfil.
absl::StatusOr<Rollout> FromProto(const v1::PutRolloutRequest& proto, const Tenant& tenant,
                                  const RequestLimits& limits);
void ToProto(const Rollout& rollout, v1::Rollout* proto);

// ---- Cache and Admin
// Unspecified becomes `fallback`.
absl::StatusOr<RunningRequests> FromProto(v1::RunningRequests running, RunningRequests fallback);
v1::CacheStats ToProto(const CacheStats& stats);
v1::ModelInfo ToProto(const ModelConfig& config, const Tokenizer* tokenizer,
                      const std::string& chat_template);

}  // namespace coppice
