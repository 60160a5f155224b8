// ReplayFleet: real coppiced processes on this machine, replicas with empty caches and, if wanted,
// a router before them. The model has one layer, one head and weights of zero: it costs next to
// nothing and draws every token evenly, so that samples differ.
//
// Owner: the program; start it on the main thread, since the processes end with the thread that
// started them. A process that does not start is a CHECK.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "coppice/v1/generation.grpc.pb.h"
#include "tests/model/file_builders.h"
#include "tests/support/daemon_process.h"

namespace coppice::bench {

// Tokens of requests, as replies say or as a replica's own metrics do.
struct TokenCounts {
  int64_t prompt = 0;
  int64_t cached = 0;  // from the device's cache
  int64_t joined = 0;  // computed for another request in flight
  int64_t computed = 0;
  int64_t completion = 0;

  int64_t hits() const { return cached + joined; }
  void Add(const v1::Usage& usage);
  void Add(const TokenCounts& other);
  std::string ToString() const;
  bool operator==(const TokenCounts&) const = default;
};

class ReplayFleet {
 public:
  static constexpr int64_t kVocab = 256;

  // `cache_tokens` of each replica: at least the model's context of 128 Ki.
  ReplayFleet(const std::string& coppiced, int64_t replicas, int64_t cache_tokens);
  void StartRouter();

  int64_t size() const { return static_cast<int64_t>(replicas_.size()); }
  v1::Generation::Stub& replica(int64_t r) { return *replica_stubs_[r]; }
  // REQUIRES: StartRouter.
  v1::Generation::Stub& router() { return *router_stub_; }
  // Of the replica with this name in the router's explanations; -1 if there is none.
  int64_t IndexOf(const std::string& name) const;
  // What the replica has counted since it started, by its /metrics.
  TokenCounts Metrics(int64_t r) const;

 private:
  const std::string coppiced_;
  TempDirectory model_;
  std::vector<std::unique_ptr<DaemonProcess>> replicas_;
  std::unique_ptr<DaemonProcess> router_;
  std::vector<std::unique_ptr<v1::Generation::Stub>> replica_stubs_;
  std::unique_ptr<v1::Generation::Stub> router_stub_;
};

}  // namespace coppice::bench
