#include "server/router/replica_address.h"

#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>
#include <memory>
#include <set>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

absl::Status BadList(absl::string_view want, absl::string_view got) {
  return absl::InvalidArgumentError(absl::StrCat("replicas not usable: want ", want, ", got \"",
                                                 got, "\"; change --replicas or --replica_dns"));
}

// Host and port of "host:port" or "[v6]:port".
absl::StatusOr<std::pair<std::string, std::string>> SplitAddress(absl::string_view address) {
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == absl::string_view::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 1 || port > 65535) {
    return BadList("HOST:PORT", address);
  }
  return std::make_pair(std::string(address.substr(0, colon)),
                        std::string(address.substr(colon + 1)));
}

absl::Status NotFound(absl::string_view want, int error) {
  return absl::UnavailableError(absl::StrCat("replicas not found: want ", want, ", got \"",
                                             gai_strerror(error),
                                             "\"; check --replica_dns and the service"));
}

// The first label of the name that DNS gives an address; empty if none.
absl::StatusOr<std::string> PodName(const addrinfo& address, absl::string_view target) {
  char host[NI_MAXHOST];
  const int error =
      getnameinfo(address.ai_addr, address.ai_addrlen, host, sizeof(host), nullptr, 0, NI_NAMEREQD);
  if (error == EAI_AGAIN) return NotFound(absl::StrCat("the name of ", target), error);
  if (error != 0) return std::string();
  const std::string name(host);
  return name.substr(0, name.find('.'));
}

std::string Numeric(const addrinfo& address) {
  char host[NI_MAXHOST];
  getnameinfo(address.ai_addr, address.ai_addrlen, host, sizeof(host), nullptr, 0, NI_NUMERICHOST);
  return address.ai_family == AF_INET6 ? absl::StrCat("[", host, "]") : std::string(host);
}

bool AllDifferent(const std::vector<ReplicaAddress>& replicas) {
  std::set<std::string> names;
  for (const ReplicaAddress& replica : replicas) names.insert(replica.name);
  return names.size() == replicas.size();
}

}  // namespace

absl::StatusOr<std::vector<ReplicaAddress>> ParseReplicas(absl::string_view list) {
  std::vector<ReplicaAddress> replicas;
  for (const absl::string_view item : absl::StrSplit(list, ',')) {
    const size_t equals = item.find('=');
    const bool named = equals != absl::string_view::npos;
    const absl::string_view target = named ? item.substr(equals + 1) : item;
    RETURN_IF_ERROR(SplitAddress(target).status());
    const absl::string_view name = named ? item.substr(0, equals) : target;
    if (name.empty() || !std::all_of(name.begin(), name.end(),
                                     [](char c) { return c > ' ' && c < 127 && c != '@'; })) {
      return BadList("names of printable ASCII without @", item);
    }
    replicas.push_back({std::string(name), std::string(target)});
  }
  std::sort(replicas.begin(), replicas.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  if (!AllDifferent(replicas)) return BadList("every name once", list);
  if (static_cast<int64_t>(replicas.size()) > kMaxReplicas) {
    return BadList(absl::StrCat("at most ", kMaxReplicas), absl::StrCat(replicas.size()));
  }
  return replicas;
}

absl::StatusOr<std::vector<ReplicaAddress>> ResolveReplicas(const std::string& host_port) {
  ASSIGN_OR_RETURN(const auto split, SplitAddress(host_port));
  const auto& [host, port] = split;
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
  if (error != 0) return NotFound(absl::StrCat("addresses of ", host), error);
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  std::vector<ReplicaAddress> replicas;
  for (const addrinfo* at = found; at != nullptr; at = at->ai_next) {
    const std::string target = absl::StrCat(Numeric(*at), ":", port);
    ASSIGN_OR_RETURN(const std::string name, PodName(*at, target));
    replicas.push_back({name, target});
  }
  replicas = NameReplicas(std::move(replicas));
  if (static_cast<int64_t>(replicas.size()) > kMaxReplicas) replicas.resize(kMaxReplicas);
  return replicas;
}

std::vector<ReplicaAddress> NameReplicas(std::vector<ReplicaAddress> found) {
  const auto unnamed = [](const ReplicaAddress& replica) { return replica.name.empty(); };
  std::vector<ReplicaAddress> named = found;
  std::erase_if(named, unnamed);
  // Several addresses may share one reverse name, as those of one machine do.
  const bool by_name = !named.empty() && AllDifferent(named);
  if (!by_name) {
    for (ReplicaAddress& replica : found) replica.name = replica.target;
  }
  std::vector<ReplicaAddress>& replicas = by_name ? named : found;
  std::sort(replicas.begin(), replicas.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  replicas.erase(std::unique(replicas.begin(), replicas.end()), replicas.end());
  return std::move(replicas);
}

}  // namespace coppice
