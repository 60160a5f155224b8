#include "tests/bench/fleet_replay_call.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/placement/prefix_hash.h"
#include "tests/bench/fleet_replay_fleet.h"

namespace coppice::bench {

void AppendTokens(uint64_t seed, int64_t count, TokenIds& ids) {
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<int32_t>(MixHash(seed, i) % ReplayFleet::kVocab));
  }
}

TokenIds FirstPrompt(const SimRequest& request, int64_t index, int64_t block_tokens) {
  TokenIds ids;
  for (const uint64_t block : request.blocks) AppendTokens(block, block_tokens, ids);
  AppendTokens(MixHash(request.prefix_hash, index),
               request.prompt_tokens - static_cast<int64_t>(ids.size()), ids);
  return ids;
}

ReplayCall::ReplayCall(const SimRequest& request, int64_t index, int64_t replica, TokenIds prompt,
                       Ended ended)
    : request_(request),
      index_(index),
      replica_(replica),
      prompt_(std::move(prompt)),
      ended_(std::move(ended)),
      samples_(request.n) {}

void ReplayCall::Start(v1::Generation::Stub& stub) {
  message_.mutable_prompt()->mutable_tokens()->mutable_ids()->Add(prompt_.begin(), prompt_.end());
  message_.set_explain_placement(replica_ < 0);
  message_.set_n(static_cast<int32_t>(request_.n));
  v1::SamplingParams& sampling = *message_.mutable_sampling();
  sampling.set_max_tokens(static_cast<int32_t>(request_.output_tokens));
  sampling.set_ignore_eos(true);
  sampling.set_seed(index_ + 1);
  // A home that is not the hash of the first tokens is a key that the caller gives. Otherwise the
  // hash is sent as clients do: that of the whole prompt's first tokens, if the replay's is
  // shorter.
  const std::string home = PrefixHashToHeader(request_.prefix_hash);
  if (request_.blocks.empty() || request_.prefix_hash != request_.blocks.front()) {
    message_.mutable_cache()->set_key(home);
  } else {
    context_.AddMetadata(kPrefixHashHeader, home);
  }
  if (request_.session != 0) message_.set_session_id(PrefixHashToHeader(request_.session));
  stub.async()->Generate(&context_, &message_, this);
  StartRead(&event_);
  StartCall();
}

void ReplayCall::OnReadDone(bool ok) {
  if (!ok) return;
  const v1::TokenChunk& chunk = event_.chunk();
  TokenIds& sample = samples_.at(chunk.sample());
  sample.insert(sample.end(), chunk.token_ids().begin(), chunk.token_ids().end());
  if (event_.has_group()) group_ = event_.group();
  StartRead(&event_);
}

void ReplayCall::OnDone(const grpc::Status& status) {
  status_ = status;
  const Ended ended = ended_;
  ended(std::unique_ptr<ReplayCall>(this));
}

bool ReplayCall::complete() const {
  const auto whole = [this](const TokenIds& sample) {
    return static_cast<int64_t>(sample.size()) == request_.output_tokens;
  };
  return status_.ok() && std::all_of(samples_.begin(), samples_.end(), whole) &&
         usage().prompt_tokens() == static_cast<int64_t>(prompt_.size()) &&
         usage().completion_tokens() == request_.n * request_.output_tokens;
}

std::string ReplayCall::Describe() const {
  return absl::StrCat("request ", index_, " not answered: want status 0 and ",
                      request_.n * request_.output_tokens, " tokens after a prompt of ",
                      prompt_.size(), ", got status ", status_.error_code(), " and ",
                      usage().completion_tokens(), " after ", usage().prompt_tokens(), "; ",
                      status_.error_message());
}

TokenIds ReplayCall::Transcript(int64_t sample) const {
  TokenIds ids = prompt_;
  ids.insert(ids.end(), samples_.at(sample).begin(), samples_.at(sample).end());
  return ids;
}

}  // namespace coppice::bench
