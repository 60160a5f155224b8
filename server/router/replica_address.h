// Where replicas are: from a flag, or from the addresses of a headless service.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace coppice {

struct ReplicaAddress {
  std::string name;    // decides which keys it owns and who leads; printable, unique
  std::string target;  // host:port

  bool operator==(const ReplicaAddress&) const = default;
};

// "NAME=HOST:PORT,..." or "HOST:PORT,...", where the name is the address. INVALID_ARGUMENT: empty,
// no port, a name twice, more than kMaxReplicas.
inline constexpr int64_t kMaxReplicas = 256;
absl::StatusOr<std::vector<ReplicaAddress>> ParseReplicas(absl::string_view list);

// All addresses of "HOST:PORT", sorted by name. A replica's name is the first label of its
// address's own name, if DNS knows one (a StatefulSet's pods: coppice-0), else the address. Blocks
// for as long as the resolver does. UNAVAILABLE with the resolver's reason.
absl::StatusOr<std::vector<ReplicaAddress>> ResolveReplicas(const std::string& host_port);

}  // namespace coppice
