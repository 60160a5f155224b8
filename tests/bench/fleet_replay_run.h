// Replays a load of the placement simulation over real processes: its block hashes become token
// ids, its turns continue what the replicas really answered. Requests start in the load's order as
// soon as fewer than `open` are open, whatever their arrival times; a turn when the request that
// it waits for has ended.
//
// Long loads are replayed with all lengths divided: of prompts, of what equal blocks stand for, of
// answers and of the caches. The policies see the load as it was; the router sees the short one.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "tests/bench/fleet_replay_fleet.h"
#include "tests/bench/placement_load.h"
#include "tests/bench/placement_sim.h"

namespace coppice::bench {

struct ReplayOptions {
  int64_t open = 1;  // requests at a time
  int64_t divisor = 1;
  int64_t cache_tokens = 0;     // of each replica, undivided: what policies know of the caches
  SimPolicy* policy = nullptr;  // chooses the replica; null: the router does
};

struct ReplayResult {
  std::vector<TokenCounts> replies;  // [replicas] sums over the replies
  int64_t expected_tokens = 0;       // hits that whoever chose expected, by blocks of 256
  int64_t errors = 0;                // requests that failed or were not answered in full
  double open_max_over_mean = 0;     // decode tokens of open requests, mean over time
  absl::Duration wall;
};

// Divides prompts and answers. REQUIRES: it divides kSimBlockTokens, no request waits for another.
void Shorten(int64_t divisor, SimLoad& load);

// `load` is shortened by options.divisor. The first request that fails is reported on stderr;
// its turns fail with it.
ReplayResult Replay(const SimLoad& load, const ReplayOptions& options, ReplayFleet& fleet);

}  // namespace coppice::bench
