// ReplayCall: one Generate call of a replay, from a request of the simulation to what came back.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "coppice/v1/generation.grpc.pb.h"
#include "tests/bench/placement_load.h"

namespace coppice::bench {

using TokenIds = std::vector<int32_t>;

// Appends ids that depend on `seed` and their place alone.
void AppendTokens(uint64_t seed, int64_t count, TokenIds& ids);
// Of a request that waits for no other: equal blocks are `block_tokens` equal ids, the rest is the
// request's own.
TokenIds FirstPrompt(const SimRequest& request, int64_t index, int64_t block_tokens);

// Owned by `ended`, which is called last and deletes it. Threads: gRPC's, one at a time.
class ReplayCall final : public grpc::ClientReadReactor<v1::GenerateEvent> {
 public:
  using Ended = std::function<void(std::unique_ptr<ReplayCall> call)>;

  // `replica`: whom it will be sent to; -1 = to the router. `request` must outlive the call.
  ReplayCall(const SimRequest& request, int64_t index, int64_t replica, TokenIds prompt,
             Ended ended);
  void Start(v1::Generation::Stub& stub);

  // ---- Once it has ended
  // Whether all samples were answered with as many tokens as were asked for.
  bool complete() const;
  std::string Describe() const;  // of one that is not
  // The prompt and what a sample answered.
  TokenIds Transcript(int64_t sample) const;

  int64_t index() const { return index_; }
  int64_t replica() const { return replica_; }
  const v1::Usage& usage() const { return group_.usage(); }
  const v1::Placement& placement() const { return group_.placement(); }  // by the router

  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  const SimRequest& request_;
  const int64_t index_, replica_;
  const TokenIds prompt_;
  const Ended ended_;
  grpc::ClientContext context_;
  v1::GenerateRequest message_;
  v1::GenerateEvent event_;
  std::vector<TokenIds> samples_;
  v1::GroupFinished group_;
  grpc::Status status_;
};

}  // namespace coppice::bench
