// A discrete-event simulation of replicas with bounded prefix caches behind a router.
//
// A replica prefills one prompt at a time and decodes all its samples together, each step a little
// longer for each of them; its cache holds the most recently used blocks. The model is crude and
// the same for every policy: it serves to compare them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "tests/bench/placement_load.h"

namespace coppice::bench {

struct SimOptions {
  int64_t replicas = 4;
  int64_t cache_tokens = 4 << 20;       // of each replica
  double prefill_tokens_per_s = 12000;  // Qwen3-4B on one H200, about
  double decode_step_s = 0.012;         // alone
  double decode_step_per_sample_s = 0.0001;
  uint64_t seed = 1;
};

struct SimResult {
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  double work_max_over_mean = 0;  // decode tokens that each replica got over the whole run
  double open_max_over_mean = 0;  // decode tokens of open requests, mean over time
  double mean_ttft_s = 0;
  double p99_ttft_s = 0;
  double end_s = 0;  // sum over steps for rl: the clock when the last request ended
};

// 1 if all are equal. REQUIRES: one is positive.
double MaxOverMean(const std::vector<double>& values);

// Chooses replicas. Sees what a router sees; `oracle` ones also the caches.
class SimPolicy {
 public:
  virtual ~SimPolicy() = default;
  // `open` [replicas]: samples that were placed there and have not ended, waiting ones included.
  // `cached` [replicas]: prompt tokens of the request that the replica's cache really holds.
  virtual int64_t Choose(const SimRequest& request, const std::vector<double>& open,
                         const std::vector<int64_t>& cached) = 0;
  virtual void Finished(const SimRequest& request, int64_t replica) {
    (void)request;
    (void)replica;
  }
};

// random, round_robin, least_loaded, consistent_hash, placement, perfect_affinity (always the
// replica whose cache truly holds most; the oracle); null for another name.
std::unique_ptr<SimPolicy> MakePolicy(const std::string& name, const SimLoad& load,
                                      const SimOptions& options);

SimResult Simulate(const SimLoad& load, const SimOptions& options, SimPolicy& policy);

}  // namespace coppice::bench
