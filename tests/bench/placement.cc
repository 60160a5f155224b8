// placement: what the router pays for choosing a replica, out of four whose believed caches are
// full. Two lines: "choose" is Place and Finish of a prompt whose hashes are known;
// "whole" hashes the prompt before. Bound: one pass over the prompt's tokens.
#include "server/placement/placement.h"

#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "server/placement/prefix_hash.h"
#include "tests/bench/benches.h"
#include "tests/bench/measure.h"

namespace coppice::bench {
namespace {

constexpr int64_t kReplicas = 4, kPrompts = 64, kMaxBlocks = 256;

std::vector<int32_t> Prompt(const Options& options, int64_t i) {
  std::vector<int32_t> tokens(options.prompt);
  uint64_t x = options.seed * kPrompts + i + 1;
  for (int32_t& t : tokens) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    t = static_cast<int32_t>((x >> 33) % 50000);
  }
  return tokens;
}

struct Hashed {
  uint64_t prefix_hash;
  std::vector<uint64_t> blocks;
};
Hashed Hash(const std::vector<int32_t>& tokens) {
  const PromptView view{.token_ids = tokens};
  return {PrefixHash(view), BlockHashes(view, kMaxBlocks)};
}

// Places a prompt and ends it at once.
absl::Status Serve(Placement& placement, const Hashed& hashed, int64_t prompt_tokens) {
  const std::optional<Placed> placed = placement.Place({.prefix_hash = hashed.prefix_hash,
                                                        .blocks = hashed.blocks,
                                                        .prompt_tokens = prompt_tokens,
                                                        .session = hashed.prefix_hash,
                                                        .n = 8,
                                                        .max_tokens = 256});
  if (!placed) return absl::InternalError("placement failed: want a replica, got none; add some");
  placement.Finish(*placed, 200);
  return absl::OkStatus();
}

// A prompt goes where it went, and is known there.
absl::Status VerifyAffinity(Placement& placement, const Options& options) {
  const Hashed hashed = Hash(Prompt(options, 0));
  const PlacementRequest request{
      .prefix_hash = hashed.prefix_hash, .blocks = hashed.blocks, .prompt_tokens = options.prompt};
  const std::optional<Placed> first = placement.Place(request), again = placement.Place(request);
  const bool same = first && again && first->replica == again->replica;
  placement.Finish(*first, -1);
  placement.Finish(*again, -1);
  const int64_t want = std::min<int64_t>(options.prompt / kPrefixTokens, kMaxBlocks);
  return Verify("placement affinity",
                same && again->predicted_hit_tokens == want * kPrefixTokens ? 0 : 1, 0);
}

absl::StatusOr<double> BoundSeconds(const std::vector<int32_t>& tokens) {
  std::vector<int32_t> copy(tokens.size());
  return MedianSeconds(101, [&] {
    std::memcpy(copy.data(), tokens.data(), tokens.size() * sizeof(tokens[0]));
    return copy == tokens ? absl::OkStatus() : absl::InternalError("copy failed");
  });
}

}  // namespace

absl::Status RunPlacement(const Options& options) {
  Placement placement({});
  for (int64_t r = 0; r < kReplicas; ++r) {
    placement.SetCacheTokens(placement.Add(absl::StrCat("coppice-", r)), options.prompt * 8);
  }
  RETURN_IF_ERROR(VerifyAffinity(placement, options));
  std::vector<std::vector<int32_t>> prompts;
  std::vector<Hashed> hashed;
  for (int64_t i = 0; i < kPrompts; ++i) {
    prompts.push_back(Prompt(options, i));
    hashed.push_back(Hash(prompts.back()));
  }
  const int64_t repeats = std::max<int64_t>(options.repeats, 1001);  // each takes microseconds
  int64_t next = 0;
  Result result{.bench = "placement", .bound = "memcpy of the prompt's tokens", .device = "cpu"};
  ASSIGN_OR_RETURN(result.bound_seconds, BoundSeconds(prompts[0]));
  result.pass = "choose";
  ASSIGN_OR_RETURN(result.seconds, MedianSeconds(repeats, [&] {
                     return Serve(placement, hashed[next++ % kPrompts], options.prompt);
                   }));
  Print(options, result);
  result.pass = "whole";
  ASSIGN_OR_RETURN(result.seconds, MedianSeconds(repeats, [&] {
                     return Serve(placement, Hash(prompts[next++ % kPrompts]), options.prompt);
                   }));
  Print(options, result);
  return absl::OkStatus();
}

}  // namespace coppice::bench
