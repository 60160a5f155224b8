#include "tests/bench/placement_sim.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <tuple>

#include "server/placement/lru_map.h"

namespace coppice::bench {
namespace {

struct Event {
  double at_s;
  int64_t request;
  bool ends;  // else it arrives

  bool operator>(const Event& other) const {
    return std::tie(at_s, request) > std::tie(other.at_s, other.request);
  }
};

struct Replica {
  explicit Replica(int64_t cache_blocks) : cache(cache_blocks) {}

  int64_t CachedTokens(const SimRequest& request) const {
    int64_t blocks = 0;
    for (const uint64_t block : request.blocks) {
      if (cache.Find(block) == nullptr) break;
      ++blocks;
    }
    return blocks * kSimBlockTokens;
  }
  void Touch(const std::vector<uint64_t>& blocks) {
    for (auto block = blocks.rbegin(); block != blocks.rend(); ++block) cache.Put(*block, true);
  }

  LruMap<bool> cache;
  double prefill_free_s = 0;
  int64_t running_samples = 0;
  double open_tokens = 0;  // to decode
  double work_tokens = 0;  // given so far
};

class Simulation {
 public:
  Simulation(const SimLoad& load, const SimOptions& options, SimPolicy& policy)
      : load_(load), options_(options), policy_(policy), placed_(load.requests.size()) {
    for (int64_t r = 0; r < options.replicas; ++r) {
      replicas_.emplace_back(options.cache_tokens / kSimBlockTokens);
    }
    next_turns_.resize(load.requests.size());
    for (size_t i = 0; i < load.requests.size(); ++i) {
      const SimRequest& request = load.requests[i];
      const auto index = static_cast<int64_t>(i);
      if (request.after >= 0) {
        next_turns_[request.after].push_back(index);
      } else {
        events_.push({request.arrival_s, index, false});
      }
    }
  }

  SimResult Run() {
    while (!events_.empty()) {
      const Event event = events_.top();
      events_.pop();
      Observe(event.at_s);
      event.ends ? End(event) : Arrive(event);
    }
    return Summary();
  }

 private:
  std::vector<double> Each(double Replica::*field) const {
    std::vector<double> values;
    for (const Replica& replica : replicas_) values.push_back(replica.*field);
    return values;
  }

  // The state has been the same since the last event.
  void Observe(double now_s) {
    const std::vector<double> open = Each(&Replica::open_tokens);
    const double seconds = now_s - now_s_;
    now_s_ = now_s;
    if (std::accumulate(open.begin(), open.end(), 0.0) <= 0) return;
    busy_s_ += seconds;
    imbalance_s_ += seconds * MaxOverMean(open);
  }

  void Arrive(const Event& event) {
    const SimRequest& request = load_.requests[event.request];
    std::vector<double> open;
    std::vector<int64_t> cached;
    for (const Replica& replica : replicas_) {
      open.push_back(static_cast<double>(replica.running_samples));
      cached.push_back(replica.CachedTokens(request));
    }
    const int64_t r = placed_[event.request] = policy_.Choose(request, open, cached);
    Replica& replica = replicas_[r];
    result_.prompt_tokens += request.prompt_tokens;
    result_.cached_tokens += cached[r];
    replica.Touch(request.blocks);

    const double prefill_s =
        static_cast<double>(request.prompt_tokens - cached[r]) / options_.prefill_tokens_per_s;
    replica.prefill_free_s = std::max(replica.prefill_free_s, event.at_s) + prefill_s;
    ttft_s_.push_back(replica.prefill_free_s - event.at_s);
    replica.running_samples += request.n;
    const double step_s = options_.decode_step_s + options_.decode_step_per_sample_s *
                                                       static_cast<double>(replica.running_samples);
    const double tokens = static_cast<double>(request.n * request.output_tokens);
    replica.open_tokens += tokens;
    replica.work_tokens += tokens;
    const double end_s =
        replica.prefill_free_s + step_s * static_cast<double>(request.output_tokens);
    events_.push({end_s, event.request, true});
  }

  void End(const Event& event) {
    const SimRequest& request = load_.requests[event.request];
    Replica& replica = replicas_[placed_[event.request]];
    replica.Touch(request.grown);
    replica.running_samples -= request.n;
    replica.open_tokens -= static_cast<double>(request.n * request.output_tokens);
    policy_.Finished(request, placed_[event.request]);
    for (const int64_t turn : next_turns_[event.request]) {
      events_.push({event.at_s + load_.requests[turn].arrival_s, turn, false});
    }
  }

  SimResult Summary() {
    SimResult result = result_;
    result.work_max_over_mean = MaxOverMean(Each(&Replica::work_tokens));
    result.open_max_over_mean = imbalance_s_ / busy_s_;
    result.end_s = now_s_;
    std::sort(ttft_s_.begin(), ttft_s_.end());
    result.mean_ttft_s =
        std::accumulate(ttft_s_.begin(), ttft_s_.end(), 0.0) / static_cast<double>(ttft_s_.size());
    result.p99_ttft_s = ttft_s_[ttft_s_.size() * 99 / 100];
    return result;
  }

  const SimLoad& load_;
  const SimOptions& options_;
  SimPolicy& policy_;
  std::vector<Replica> replicas_;
  std::vector<int64_t> placed_;                   // [request] replica
  std::vector<std::vector<int64_t>> next_turns_;  // [request]
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
  double now_s_ = 0, busy_s_ = 0, imbalance_s_ = 0;
  std::vector<double> ttft_s_;
  SimResult result_;
};

}  // namespace

double MaxOverMean(const std::vector<double>& values) {
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return *std::max_element(values.begin(), values.end()) * static_cast<double>(values.size()) / sum;
}

SimResult Simulate(const SimLoad& load, const SimOptions& options, SimPolicy& policy) {
  return Simulation(load, options, policy).Run();
}

}  // namespace coppice::bench
