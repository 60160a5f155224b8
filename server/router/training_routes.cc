#include "server/router/training_routes.h"

#include <algorithm>
#include <optional>

#include "coppice/v1/training.pb.h"
#include "kernels/base/status_macros.h"
#include "server/router/message_bytes.h"

namespace coppice {
namespace {

constexpr char kTrainStep[] = "/coppice.v1.Training/TrainStep";
constexpr char kForwardBackward[] = "/coppice.v1.Training/ForwardBackward";
constexpr char kOptimStep[] = "/coppice.v1.Training/OptimStep";
constexpr char kLoadCheckpoint[] = "/coppice.v1.Training/LoadCheckpoint";

// Absent if the id names no replica.
std::optional<RolloutName> Split(const std::string& id) {
  const size_t at = id.rfind('@');
  if (at == std::string::npos) return std::nullopt;
  return RolloutName{id.substr(0, at), id.substr(at + 1)};
}

template <typename Request>
absl::Status ReadGroups(const std::string& leader, grpc::ByteBuffer& buffer,
                        std::vector<RolloutName>& elsewhere) {
  ASSIGN_OR_RETURN(Request request, Parse<Request>(buffer));
  bool changed = false;
  for (v1::Group& group : *request.mutable_groups()) {
    if (!group.has_rollout_id()) continue;
    std::optional<RolloutName> name = Split(group.rollout_id());
    if (!name) continue;
    if (name->replica == leader) {
      group.set_rollout_id(name->id);
      changed = true;
    } else {
      elsewhere.push_back(*std::move(name));
    }
  }
  const auto order = [](const RolloutName& a, const RolloutName& b) {
    return a.replica != b.replica ? a.replica < b.replica : a.id < b.id;
  };
  std::sort(elsewhere.begin(), elsewhere.end(), order);
  elsewhere.erase(std::unique(elsewhere.begin(), elsewhere.end()), elsewhere.end());
  if (changed) Serialize(request, buffer);
  return absl::OkStatus();
}

absl::Status ReadGet(grpc::ByteBuffer& buffer, std::string& replica) {
  ASSIGN_OR_RETURN(v1::GetRolloutRequest request, Parse<v1::GetRolloutRequest>(buffer));
  const std::optional<RolloutName> name = Split(request.rollout_id());
  if (!name) return absl::OkStatus();
  replica = name->replica;
  request.set_rollout_id(name->id);
  Serialize(request, buffer);
  return absl::OkStatus();
}

absl::Status ReadPut(const std::string& leader, grpc::ByteBuffer& buffer) {
  ASSIGN_OR_RETURN(v1::PutRolloutRequest request, Parse<v1::PutRolloutRequest>(buffer));
  const std::optional<RolloutName> name = Split(request.rollout_id());
  if (!name || name->replica != leader) return absl::OkStatus();
  request.set_rollout_id(name->id);
  Serialize(request, buffer);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TrainingFacts> ReadTraining(absl::string_view method, const std::string& leader,
                                           grpc::ByteBuffer& request) {
  TrainingFacts facts;
  facts.changes_policy = method == kTrainStep || method == kOptimStep || method == kLoadCheckpoint;
  absl::Status status;
  if (method == kTrainStep) {
    status = ReadGroups<v1::TrainStepRequest>(leader, request, facts.elsewhere);
  } else if (method == kForwardBackward) {
    status = ReadGroups<v1::ForwardBackwardRequest>(leader, request, facts.elsewhere);
  } else if (method == kGetRolloutMethod) {
    status = ReadGet(request, facts.replica);
  } else if (method == kPutRolloutMethod) {
    status = ReadPut(leader, request);
  }
  if (!status.ok()) return status;
  return facts;
}

grpc::ByteBuffer GetRolloutRequestFor(const RolloutName& rollout) {
  v1::GetRolloutRequest request;
  request.set_rollout_id(rollout.id);
  grpc::ByteBuffer buffer;
  Serialize(request, buffer);
  return buffer;
}

grpc::ByteBuffer PutRolloutRequestFor(const RolloutName& rollout, grpc::ByteBuffer answer) {
  v1::PutRolloutRequest id;
  id.set_rollout_id(rollout.ToString());
  Append(id, answer);
  return answer;
}

}  // namespace coppice
