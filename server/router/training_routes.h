// What the router has to know of training requests: the rollouts that they name. Through a router a
// rollout's id is "<id>@<replica>": the replica generated it and keeps it, its home. The leader
// knows its own by <id>, and those that were brought to it by the whole name.
//
// Pure functions, any thread. A client's bytes that do not parse are INVALID_ARGUMENT.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "grpcpp/support/byte_buffer.h"

namespace coppice {

inline constexpr char kGetRolloutMethod[] = "/coppice.v1.Training/GetRollout";
inline constexpr char kPutRolloutMethod[] = "/coppice.v1.Training/PutRollout";

struct RolloutName {
  std::string id;       // at its home
  std::string replica;  // its home

  std::string ToString() const { return id + "@" + replica; }
  bool operator==(const RolloutName&) const = default;
};

struct TrainingFacts {
  bool changes_policy = false;         // or may
  std::string replica;                 // where to send it; empty = the leader
  std::vector<RolloutName> elsewhere;  // that a step needs from other replicas, each once
};
// Takes "@leader" off the ids in `request`, and of GetRollout whatever the replica.
absl::StatusOr<TrainingFacts> ReadTraining(absl::string_view method, const std::string& leader,
                                           grpc::ByteBuffer& request);

// The request for a rollout at its home, and that which keeps its answer at the leader.
grpc::ByteBuffer GetRolloutRequestFor(const RolloutName& rollout);
grpc::ByteBuffer PutRolloutRequestFor(const RolloutName& rollout, grpc::ByteBuffer answer);

}  // namespace coppice
