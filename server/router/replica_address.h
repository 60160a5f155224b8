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

// All addresses of "HOST:PORT", by NameReplicas; the names are the first labels of the addresses'
// own (a StatefulSet's pods: coppice-0). Blocks for as long as the resolver does. UNAVAILABLE with
// the resolver's reason, also if it could not tell a name for now.
absl::StatusOr<std::vector<ReplicaAddress>> ResolveReplicas(const std::string& host_port);

// Sorted by name. An empty name means that DNS knows none: if some have names, those without one
// are left out until they do; if none has, or a name is not unique, every name is the address.
std::vector<ReplicaAddress> NameReplicas(std::vector<ReplicaAddress> found);

}  // namespace coppice
