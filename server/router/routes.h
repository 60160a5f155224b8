// Routes: what kind of call a method is, and what placement has to know of its request. With
// training_routes.h the only place of the router that looks into messages; all others are passed
// through as bytes.
//
// Pure functions, any thread. A client's bytes that do not parse are INVALID_ARGUMENT.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "grpcpp/support/byte_buffer.h"
#include "server/placement/placement.h"

namespace coppice {

// In order of kRouteLabels (server/router/router_metrics.h).
enum class Route {
  kGenerate,         // placed by its prompt; where the leader's policy is if it is retained
  kWarm,             // placed by its prompt
  kScore,            // placed by its first prompt
  kGenerationOther,  // Tokenize, Detokenize: any; Abort: all
  kTraining,         // the leader, but GetRollout: the rollout's home
  kCache,            // all, merged
  kAdmin,            // all, merged
  kUnknown,          // UNIMPLEMENTED
};
// `method` as gRPC has it: "/coppice.v1.Generation/Generate".
Route RouteOf(absl::string_view method);
// Whether the call goes to all replicas and their answers are merged into one (Merge).
bool IsFanOut(absl::string_view method);

// Whether the first byte of its answer may take any time: unary work of any length, or a wait for
// what runs.
bool TakesLong(absl::string_view method);

// A request as placement sees it.
struct PlacementFacts {
  uint64_t prefix_hash = 0;
  std::vector<uint64_t> blocks;
  int64_t prompt_tokens = 0;  // of text: a quarter of its bytes
  uint64_t session = 0;
  int64_t n = 1;
  int64_t max_tokens = 0;
  bool retain = false;
  bool explain = false;  // the caller wants to know where it went
};
// Of a Generate, Warm or Score request. `prefix_header`: the caller's own hash, if it sent one.
absl::StatusOr<PlacementFacts> ReadPlacementFacts(Route route, const grpc::ByteBuffer& request,
                                                  absl::string_view tenant,
                                                  std::optional<uint64_t> prefix_header);

// What the router learns from one event of a Generate stream; chunks are not parsed.
struct EventFacts {
  bool started = false;
  int64_t prompt_tokens = 0;  // of started
  int64_t hit_tokens = 0;     // of started: cached in any tier, or joined
  bool group = false;
  int64_t completion_tokens = 0;  // of group: all samples
  std::string rollout_id;         // of group, if retained
};
EventFacts ReadEvent(const grpc::ByteBuffer& event);

// Where a call went, and why: GroupFinished.placement.
struct Explanation {
  std::string replica, home;
  PlacedBy by = PlacedBy::kHome;
  uint64_t prefix_hash = 0;
  int64_t predicted_hit_tokens = 0;
  double load = 0, charge = 0;
  int attempts = 0;
};
// Puts these fields into the last event of a stream by bytes after its own. Empty and absent ones
// stay as they are.
void AddToGroup(const std::string& rollout_id, const std::optional<Explanation>& explanation,
                grpc::ByteBuffer& event);

// One answer out of those of all replicas, the leader's first: counts are added up, everything else
// is the first one's. INTERNAL if one does not parse. REQUIRES: IsFanOut(method), not empty.
absl::StatusOr<grpc::ByteBuffer> Merge(absl::string_view method,
                                       const std::vector<grpc::ByteBuffer>& answers);

}  // namespace coppice
