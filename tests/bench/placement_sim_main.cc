// placement_sim [--trace FILE]: cached tokens and balance of each policy over four replicas, on a
// load of reinforcement learning and, if given, on a Mooncake trace. One JSON object a line.
//
//   zcat conversation_trace.jsonl.gz | placement_sim --trace /dev/stdin
#include <cstring>
#include <iostream>

#include "nlohmann/json.hpp"
#include "tests/bench/commit.h"
#include "tests/bench/placement_sim.h"

namespace coppice::bench {
namespace {

constexpr const char* kPolicies[] = {"random",          "round_robin", "least_loaded",
                                     "consistent_hash", "placement",   "perfect_affinity"};

// Upper bound of any router: one replica with the memory of all.
SimResult Pooled(const SimLoad& load, SimOptions options) {
  options.cache_tokens *= options.replicas;
  options.prefill_tokens_per_s *= static_cast<double>(options.replicas);
  options.decode_step_per_sample_s /= static_cast<double>(options.replicas);
  options.replicas = 1;
  return Simulate(load, options, *MakePolicy("round_robin", load, options));
}

void Print(const SimLoad& load, const SimOptions& options, const std::string& policy,
           const SimResult& result, const SimResult& oracle) {
  const auto ratio = [](int64_t a, int64_t b) {
    return static_cast<double>(a) / static_cast<double>(b);
  };
  const nlohmann::ordered_json line = {
      {"bench", "placement_sim"},
      {"load", load.name},
      {"policy", policy},
      {"replicas", options.replicas},
      {"cache_tokens", options.cache_tokens},
      {"requests", load.requests.size()},
      {"prompt_tokens", result.prompt_tokens},
      {"cached_tokens", result.cached_tokens},
      {"hit_rate", ratio(result.cached_tokens, result.prompt_tokens)},
      {"of_perfect_affinity", ratio(result.cached_tokens, oracle.cached_tokens)},
      {"load_max_over_mean", result.work_max_over_mean},
      {"open_load_max_over_mean", result.open_max_over_mean},
      {"ttft_mean_s", result.mean_ttft_s},
      {"ttft_p99_s", result.p99_ttft_s},
      {"commit", kCommit},
  };
  std::cout << line.dump() << std::endl;
}

void Compare(const SimLoad& load, const SimOptions& options) {
  const SimResult oracle = Simulate(load, options, *MakePolicy("perfect_affinity", load, options));
  for (const char* policy : kPolicies) {
    Print(load, options, policy, Simulate(load, options, *MakePolicy(policy, load, options)),
          oracle);
  }
  Print(load, options, "pooled_cache", Pooled(load, options), oracle);
}

int Main(int argc, char** argv) {
  const bool trace = argc == 3 && std::strcmp(argv[1], "--trace") == 0;
  if (argc != 1 && !trace) {
    std::cerr << "usage: placement_sim [--trace FILE]\n";
    return 2;
  }
  Compare(MakeRlLoad({}), {});
  if (!trace) return 0;
  const absl::StatusOr<SimLoad> load = ReadTrace(argv[2]);
  if (!load.ok()) {
    std::cerr << "placement_sim: " << load.status().message() << "\n";
    return 1;
  }
  Compare(*load, {});
  return 0;
}

}  // namespace
}  // namespace coppice::bench

int main(int argc, char** argv) { return coppice::bench::Main(argc, argv); }
