#include <algorithm>
#include <deque>
#include <map>
#include <random>

#include "server/placement/placement.h"
#include "server/placement/prefix_hash.h"
#include "tests/bench/placement_sim.h"

namespace coppice::bench {
namespace {

int64_t Least(const std::vector<double>& open) {
  return std::min_element(open.begin(), open.end()) - open.begin();
}

class Random final : public SimPolicy {
 public:
  Random(int64_t replicas, uint64_t seed) : pick_(0, replicas - 1), rng_(seed) {}
  int64_t Choose(const SimRequest&, const std::vector<double>&,
                 const std::vector<int64_t>&) override {
    return pick_(rng_);
  }

 private:
  std::uniform_int_distribution<int64_t> pick_;
  std::mt19937_64 rng_;
};

class RoundRobin final : public SimPolicy {
 public:
  int64_t Choose(const SimRequest&, const std::vector<double>& open,
                 const std::vector<int64_t>&) override {
    return next_++ % static_cast<int64_t>(open.size());
  }

 private:
  int64_t next_ = 0;
};

class LeastLoaded final : public SimPolicy {
 public:
  int64_t Choose(const SimRequest&, const std::vector<double>& open,
                 const std::vector<int64_t>&) override {
    return Least(open);
  }
};

// The session if the caller names one, else the prompt's first tokens: what a hash of a header
// does.
class ConsistentHash final : public SimPolicy {
 public:
  int64_t Choose(const SimRequest& request, const std::vector<double>& open,
                 const std::vector<int64_t>&) override {
    int64_t home = 0;
    for (size_t r = 1; r < open.size(); ++r) {
      if (MixHash(request.prefix_hash, r) > MixHash(request.prefix_hash, home)) {
        home = static_cast<int64_t>(r);
      }
    }
    return home;
  }
};

// Knows the caches: a conversation goes where most of it is, whatever the load; one that no replica
// holds more of than a common system prompt goes to the least loaded.
class PerfectAffinity final : public SimPolicy {
 public:
  int64_t Choose(const SimRequest&, const std::vector<double>& open,
                 const std::vector<int64_t>& cached) override {
    const int64_t best = std::max_element(cached.begin(), cached.end()) - cached.begin();
    return cached[best] > kSystemPromptTokens ? best : Least(open);
  }

 private:
  static constexpr int64_t kSystemPromptTokens = 512;
};

class ByPlacement final : public SimPolicy {
 public:
  ByPlacement(const SimLoad& load, const SimOptions& options)
      : max_tokens_(load.max_tokens), placement_({}) {
    for (int64_t r = 0; r < options.replicas; ++r) {
      ids_.push_back(placement_.Add(std::string("replica-") + std::to_string(r)));
      placement_.SetCacheTokens(ids_.back(), options.cache_tokens);
    }
  }
  int64_t Choose(const SimRequest& request, const std::vector<double>&,
                 const std::vector<int64_t>&) override {
    const coppice::Placed placed = *placement_.Place({.prefix_hash = request.prefix_hash,
                                                      .blocks = request.blocks,
                                                      .prompt_tokens = request.prompt_tokens,
                                                      .session = request.session,
                                                      .n = request.n,
                                                      .max_tokens = max_tokens_});
    open_[&request] = placed;
    return std::find(ids_.begin(), ids_.end(), placed.replica) - ids_.begin();
  }
  void Finished(const SimRequest& request, int64_t) override {
    placement_.Finish(open_.at(&request), static_cast<double>(request.output_tokens));
    open_.erase(&request);
  }

 private:
  const int64_t max_tokens_;
  Placement placement_;
  std::vector<ReplicaId> ids_;
  std::map<const SimRequest*, coppice::Placed> open_;
};

}  // namespace

std::unique_ptr<SimPolicy> MakePolicy(const std::string& name, const SimLoad& load,
                                      const SimOptions& options) {
  if (name == "random") return std::make_unique<Random>(options.replicas, options.seed);
  if (name == "round_robin") return std::make_unique<RoundRobin>();
  if (name == "least_loaded") return std::make_unique<LeastLoaded>();
  if (name == "consistent_hash") return std::make_unique<ConsistentHash>();
  if (name == "perfect_affinity") return std::make_unique<PerfectAffinity>();
  if (name == "placement") return std::make_unique<ByPlacement>(load, options);
  return nullptr;
}

}  // namespace coppice::bench
