// radix: bookkeeping of one prompt. Two lines: "miss" is match, allocate and publish of a prompt
// never seen, in a full cache, so that as many blocks are evicted; "hit" is match and publish
// (which renews) of a stored one. Both include the lease's end. Bound: comparing and copying the
// prompt's tokens.
#include <cstring>
#include <vector>

#include "cache/radix_cache.h"
#include "kernels/base/status_macros.h"
#include "tests/bench/benches.h"
#include "tests/bench/measure.h"

namespace coppice::bench {
namespace {

// Distinct from the first block on, as many as are never all in the cache.
constexpr int64_t kPrompts = 8, kCached = 4;

std::vector<int32_t> Prompt(const Options& options, int64_t i) {
  std::vector<int32_t> tokens(options.prompt);
  uint64_t x = options.seed + 1;
  for (int32_t& t : tokens) {
    x = x * 6364136223846793005u + 1442695040888963407u;
    t = static_cast<int32_t>((x >> 33) % 50000);
  }
  tokens[0] = static_cast<int32_t>(i);
  return tokens;
}

// Match, allocate what is missing, publish everything committed.
absl::StatusOr<Lease> Serve(RadixCache& cache, const Namespace& ns,
                            const std::vector<int32_t>& tokens) {
  MatchResult match = cache.Match(ns, tokens, {});
  const int64_t whole = static_cast<int64_t>(tokens.size()) / cache.block_tokens();
  const int64_t missing = whole - static_cast<int64_t>(match.lease.blocks().size());
  ASSIGN_OR_RETURN(BlockSet blocks, cache.Allocate(missing));
  const int64_t num_tokens = whole * cache.block_tokens();
  cache.Publish(ns, absl::MakeConstSpan(tokens).first(num_tokens), match.lease, std::move(blocks),
                {.committed_tokens = num_tokens});
  return std::move(match.lease);
}

// A stored prompt is found with its blocks; one that differs at a token matches up to that block.
absl::Status VerifyContent(const Options& options, RadixCache& cache, const Namespace& ns) {
  const std::vector<int32_t> tokens = Prompt(options, 0);
  std::vector<BlockId> blocks;
  {
    ASSIGN_OR_RETURN(const Lease lease, Serve(cache, ns, tokens));
    blocks = lease.blocks();
  }
  const int64_t bt = options.block_tokens;
  const int64_t whole = options.prompt / bt;
  for (int64_t cut = 0; cut < options.prompt; cut += 1 + options.prompt / 37) {
    std::vector<int32_t> other = tokens;
    other[cut] = -1;
    const MatchResult match = cache.Match(ns, other, {});
    const int64_t want = std::min(cut / bt, whole);
    const std::vector<BlockId>& got = match.lease.blocks();
    if (static_cast<int64_t>(got.size()) != want ||
        !std::equal(got.begin(), got.end(), blocks.begin())) {
      return Verify("radix content", 1, 0);
    }
  }
  return cache.CheckInvariants();
}

absl::StatusOr<double> BoundSeconds(const Options& options) {
  const std::vector<int32_t> a = Prompt(options, 0), b = a;
  std::vector<int32_t> copy(a.size());
  int differences = 0;
  ASSIGN_OR_RETURN(const double seconds, MedianSeconds(101, [&] {
                     differences += std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) != 0;
                     std::memcpy(copy.data(), a.data(), a.size() * sizeof(a[0]));
                     return absl::OkStatus();
                   }));
  RETURN_IF_ERROR(Verify("token copy", differences + (copy == a ? 0 : 1), 0));
  return seconds;
}

}  // namespace

absl::Status RunRadix(const Options& options) {
  const Namespace ns = MakeNamespace({.model = "bench", .kv_layout = "f32"});
  const int64_t whole = options.prompt / options.block_tokens;
  {
    RadixCache cache({2 * whole + 1, options.block_tokens});
    RETURN_IF_ERROR(VerifyContent(options, cache, ns));
  }
  RadixCache cache({kCached * whole, options.block_tokens});
  std::vector<std::vector<int32_t>> prompts;
  for (int64_t i = 0; i < kPrompts; ++i) prompts.push_back(Prompt(options, i));
  const int64_t repeats = std::max<int64_t>(options.repeats, 101);  // each takes microseconds
  int64_t next = 0;
  Result result{
      .bench = "radix", .bound = "memcmp and memcpy of the prompt's tokens", .device = "cpu"};
  ASSIGN_OR_RETURN(result.bound_seconds, BoundSeconds(options));
  result.pass = "miss";
  ASSIGN_OR_RETURN(result.seconds, MedianSeconds(repeats, [&] {
                     return Serve(cache, ns, prompts[next++ % kPrompts]).status();
                   }));
  Print(options, result);
  result.pass = "hit";
  ASSIGN_OR_RETURN(result.seconds,
                   MedianSeconds(repeats, [&] { return Serve(cache, ns, prompts[0]).status(); }));
  Print(options, result);
  return absl::OkStatus();
}

}  // namespace coppice::bench
