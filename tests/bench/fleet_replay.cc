// fleet_replay COPPICED [--trace=FILE] [--trace_requests=N] [--rl_groups=N] [--rl_samples=N]
//              [--trace_open=N] [--trace_divisor=N] [--rl_open=N] [--cache_tokens=N]
//              [--policies=NAME,...]
//
// The loads of placement_sim over four real daemons: through the real router, and for comparison
// straight to the daemons, each request where a policy of the simulation says. One JSON object a
// line; caches start empty for each. The model is tiny, the router is as it is in production.
// Lengths are whole in the load of reinforcement learning; in the trace, prompts, blocks, answers
// and caches are divided by --trace_divisor, or attention over them would take hours. Fails if a
// request fails, or if the sums of a replica's replies are not what its own metrics say.
//
//   zcat conversation_trace.jsonl.gz | fleet_replay build/.../coppiced --trace=/dev/stdin
#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"
#include "nlohmann/json.hpp"
#include "tests/bench/commit.h"
#include "tests/bench/fleet_replay_fleet.h"
#include "tests/bench/fleet_replay_run.h"

namespace coppice::bench {
namespace {

constexpr char kRouter[] = "router", kOracle[] = "perfect_affinity";

struct Options {
  std::string coppiced;
  std::string trace;
  int64_t trace_requests = 12031;  // all of it
  // As many tokens as are open in the simulation: about 20 requests, each longer by the divisor.
  int64_t trace_open = 160;
  int64_t trace_divisor = 8;
  int64_t rl_groups = 64;
  int64_t rl_samples = 8;
  int64_t rl_open = 512;  // all samples of all groups
  // The oracle first: the others are measured by it.
  std::vector<std::string> policies = {kOracle,       kRouter,        "random",
                                       "round_robin", "least_loaded", "consistent_hash"};
  SimOptions sim;
};

bool ParseFlag(absl::string_view arg, Options& options) {
  if (absl::ConsumePrefix(&arg, "--trace=")) {
    options.trace = std::string(arg);
    return true;
  }
  if (absl::ConsumePrefix(&arg, "--policies=")) {
    options.policies = absl::StrSplit(arg, ',');
    return std::all_of(options.policies.begin(), options.policies.end(), [](const auto& name) {
      return name == kRouter || MakePolicy(name, {}, {}) != nullptr;
    });
  }
  const std::map<absl::string_view, int64_t*> numbers = {
      {"--trace_requests", &options.trace_requests}, {"--trace_open", &options.trace_open},
      {"--trace_divisor", &options.trace_divisor},   {"--rl_groups", &options.rl_groups},
      {"--rl_samples", &options.rl_samples},         {"--rl_open", &options.rl_open},
      {"--cache_tokens", &options.sim.cache_tokens}};
  const std::pair<absl::string_view, absl::string_view> flag =
      absl::StrSplit(arg, absl::MaxSplits('=', 1));
  const auto number = numbers.find(flag.first);
  return number != numbers.end() && absl::SimpleAtoi(flag.second, number->second) &&
         *number->second > 0;
}

double Ratio(int64_t a, int64_t b) { return static_cast<double>(a) / static_cast<double>(b); }

class Comparison {
 public:
  Comparison(const Options& options, const SimLoad& load, int64_t open, int64_t divisor)
      : options_(options), load_(load), open_(open), divisor_(divisor) {}

  // False if a request failed or a sum is wrong.
  bool Run() {
    bool ok = true;
    for (const std::string& policy : options_.policies) ok = RunPolicy(policy) && ok;
    return ok;
  }

 private:
  bool RunPolicy(const std::string& name) {
    ReplayFleet fleet(options_.coppiced, options_.sim.replicas,
                      options_.sim.cache_tokens / divisor_);
    if (name == kRouter) fleet.StartRouter();
    const std::unique_ptr<SimPolicy> policy = MakePolicy(name, load_, options_.sim);
    const ReplayOptions replay{.open = open_,
                               .divisor = divisor_,
                               .cache_tokens = options_.sim.cache_tokens,
                               .policy = policy.get()};
    const ReplayResult result = Replay(load_, replay, fleet);
    Print(name, result);
    return result.errors == 0 && SumsAgree(result, fleet);
  }

  static bool SumsAgree(const ReplayResult& result, const ReplayFleet& fleet) {
    bool agree = true;
    for (int64_t r = 0; r < fleet.size(); ++r) {
      const TokenCounts replies = result.replies[r], metrics = fleet.Metrics(r);
      if (replies == metrics) continue;
      std::cerr << "fleet_replay: sums differ on replica " << r << ": want its metrics' "
                << metrics.ToString() << ", got from its replies " << replies.ToString() << "\n";
      agree = false;
    }
    return agree;
  }

  void Print(const std::string& policy, const ReplayResult& result) {
    TokenCounts all;
    std::vector<double> work;
    for (const TokenCounts& replica : result.replies) {
      all.Add(replica);
      work.push_back(static_cast<double>(replica.completion));
    }
    if (policy == kOracle) oracle_hits_ = all.hits();
    const nlohmann::ordered_json line = {
        {"bench", "fleet_replay"},
        {"load", load_.name},
        {"policy", policy},
        {"replicas", options_.sim.replicas},
        {"cache_tokens", options_.sim.cache_tokens / divisor_},
        {"divisor", divisor_},
        {"open", open_},
        {"requests", load_.requests.size()},
        {"errors", result.errors},
        {"prompt_tokens", all.prompt},
        {"cached_tokens", all.hits()},
        {"joined_tokens", all.joined},
        {"expected_tokens", result.expected_tokens},
        {"completion_tokens", all.completion},
        {"hit_rate", Ratio(all.hits(), all.prompt)},
        {"of_perfect_affinity", Ratio(all.hits(), oracle_hits_)},
        {"load_max_over_mean", MaxOverMean(work)},
        {"open_load_max_over_mean", result.open_max_over_mean},
        {"wall_s", absl::ToDoubleSeconds(result.wall)},
        {"commit", kCommit},
    };
    std::cout << line.dump() << std::endl;
  }

  const Options& options_;
  const SimLoad& load_;
  const int64_t open_, divisor_;
  int64_t oracle_hits_ = 0;
};

absl::StatusOr<SimLoad> TraceLoad(const Options& options) {
  ASSIGN_OR_RETURN(SimLoad trace, ReadTrace(options.trace));
  const auto most = static_cast<size_t>(options.trace_requests);
  if (trace.requests.size() > most) trace.requests.resize(most);
  Shorten(options.trace_divisor, trace);
  return trace;
}

absl::Status Run(const Options& options) {
  absl::StatusOr<SimLoad> trace = absl::NotFoundError("no trace given");
  if (!options.trace.empty()) {
    trace = TraceLoad(options);
    RETURN_IF_ERROR(trace.status());
  }
  const SimLoad rl =
      MakeRlLoad({.steps = 1, .groups = options.rl_groups, .samples = options.rl_samples});
  bool ok = Comparison(options, rl, options.rl_open, /*divisor=*/1).Run();
  if (trace.ok()) {
    ok = Comparison(options, *trace, options.trace_open, options.trace_divisor).Run() && ok;
  }
  return ok ? absl::OkStatus()
            : absl::InternalError("want every request answered and counted alike, got the above");
}

int Main(int argc, char** argv) {
  Options options;
  bool good = argc > 1;
  for (int i = 2; i < argc; ++i) good = ParseFlag(argv[i], options) && good;
  if (!good || kSimBlockTokens % options.trace_divisor != 0) {
    std::cerr << "usage: fleet_replay COPPICED [--trace=FILE] [--trace_requests=N] [--trace_open=N]"
                 " [--trace_divisor=N, divides 256] [--rl_groups=N] [--rl_samples=N] [--rl_open=N]"
                 " [--cache_tokens=N] [--policies=NAME,...]\n";
    return 2;
  }
  options.coppiced = argv[1];
  const absl::Status status = Run(options);
  if (!status.ok()) std::cerr << "fleet_replay: " << status.message() << "\n";
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace coppice::bench

int main(int argc, char** argv) { return coppice::bench::Main(argc, argv); }
