#include "tests/bench/fleet_replay_run.h"

#include <algorithm>
#include <deque>
#include <iostream>
#include <memory>
#include <tuple>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "kernels/base/check.h"
#include "kernels/base/clock.h"
#include "server/placement/prefix_hash.h"
#include "server/placement/prefix_index.h"
#include "tests/bench/fleet_replay_call.h"

namespace coppice::bench {
namespace {

// What a replica's cache holds, as the simulation has it: the newest blocks, those in flight too.
class KnownCache {
 public:
  explicit KnownCache(int64_t tokens) : index_(tokens / kSimBlockTokens) {}

  int64_t CachedTokens(const SimRequest& request) const {
    return index_.Match(request.blocks, 0) * kSimBlockTokens;
  }
  void Begin(const SimRequest& request) { index_.Touch(request.blocks, 0); }
  void End(const SimRequest& request) {
    index_.Touch(request.grown, 0);
    index_.Touch(request.blocks, 0);  // read until now: no older than what grew on them
  }

 private:
  PrefixIndex index_;
};

struct Served {
  int64_t replica = -1;
  absl::Duration began, ended;
};

class Replayer {
 public:
  Replayer(const SimLoad& load, const ReplayOptions& options, ReplayFleet& fleet)
      : load_(load),
        options_(options),
        fleet_(fleet),
        turns_(load.requests.size()),
        prompts_(load.requests.size()),
        served_(load.requests.size()),
        open_samples_(fleet.size()) {
    for (int64_t r = 0; r < fleet.size(); ++r) caches_.emplace_back(options.cache_tokens);
    result_.replies.resize(fleet.size());
    for (size_t i = 0; i < load.requests.size(); ++i) {
      const int64_t after = load.requests[i].after;
      const auto index = static_cast<int64_t>(i);
      after < 0 ? ready_.push_back(index) : turns_[after].push_back(index);
    }
  }

  ReplayResult Run() {
    const absl::Duration began = clock_.Now();
    Calls first;
    {
      absl::MutexLock lock(&mutex_);
      first = NextCalls();
    }
    Start(std::move(first));
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(this, &Replayer::AllEnded));
    result_.wall = clock_.Now() - began;
    result_.open_max_over_mean = OpenMaxOverMean();
    return result_;
  }

 private:
  using Calls = std::vector<std::unique_ptr<ReplayCall>>;

  // Takes what may start now out of the queue.
  Calls NextCalls() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Outside the lock: gRPC may run a call's reactions on this stack.
  void Start(Calls calls) {
    for (std::unique_ptr<ReplayCall>& call : calls) {
      ReplayCall* const started = call.release();  // it comes back in End
      started->Start(started->replica() < 0 ? fleet_.router() : fleet_.replica(started->replica()));
    }
  }
  void End(std::unique_ptr<ReplayCall> call) {
    {
      absl::MutexLock lock(&mutex_);
      Settle(*call);
    }
    // Before Run may return: it holds a channel, and gRPC's own thread must not drop the last one.
    call.reset();
    Calls next;
    {
      absl::MutexLock lock(&mutex_);
      --num_open_;
      next = NextCalls();
    }
    Start(std::move(next));  // after the last call: none, and `this` may be gone
  }

  int64_t Choose(const SimRequest& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  TokenIds PromptOf(int64_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Settle(const ReplayCall& call) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The replica that served the call, its place in the books given back.
  int64_t ReplicaOf(const ReplayCall& call) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Fail(int64_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  bool AllEnded() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return num_open_ == 0 && ready_.empty();
  }
  double OpenMaxOverMean() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const SimLoad& load_;
  const ReplayOptions& options_;
  ReplayFleet& fleet_;
  const SteadyClock clock_;

  absl::Mutex mutex_;
  std::vector<std::vector<int64_t>> turns_ ABSL_GUARDED_BY(mutex_);  // [request] who waits for it
  std::vector<TokenIds> prompts_ ABSL_GUARDED_BY(mutex_);  // [request] of a later turn: its start
  std::vector<Served> served_ ABSL_GUARDED_BY(mutex_);     // [request]
  std::vector<double> open_samples_ ABSL_GUARDED_BY(mutex_);  // [replica]
  std::vector<KnownCache> caches_ ABSL_GUARDED_BY(mutex_);    // [replica]
  std::deque<int64_t> ready_ ABSL_GUARDED_BY(mutex_);
  int64_t num_open_ ABSL_GUARDED_BY(mutex_) = 0;
  ReplayResult result_ ABSL_GUARDED_BY(mutex_);
};

Replayer::Calls Replayer::NextCalls() {
  Calls calls;
  for (; !ready_.empty() && num_open_ < options_.open; ready_.pop_front(), ++num_open_) {
    const int64_t index = ready_.front();
    const SimRequest& request = load_.requests[index];
    const int64_t replica = options_.policy == nullptr ? -1 : Choose(request);
    served_[index].began = clock_.Now();
    calls.push_back(std::make_unique<ReplayCall>(
        request, index, replica, PromptOf(index),
        [this](std::unique_ptr<ReplayCall> call) { End(std::move(call)); }));
  }
  return calls;
}

int64_t Replayer::Choose(const SimRequest& request) {
  std::vector<int64_t> cached;
  for (const KnownCache& cache : caches_) cached.push_back(cache.CachedTokens(request));
  const int64_t replica = options_.policy->Choose(request, open_samples_, cached);
  result_.expected_tokens += cached[replica] / options_.divisor;
  open_samples_[replica] += static_cast<double>(request.n);
  caches_[replica].Begin(request);
  return replica;
}

// Of a later turn: the transcript so far and a tool's answer.
TokenIds Replayer::PromptOf(int64_t index) {
  const SimRequest& request = load_.requests[index];
  if (request.after < 0) {
    return FirstPrompt(request, index, kSimBlockTokens / options_.divisor);
  }
  TokenIds prompt = std::move(prompts_[index]);
  AppendTokens(MixHash(request.session, index),
               request.prompt_tokens - static_cast<int64_t>(prompt.size()), prompt);
  return prompt;
}

void Replayer::Settle(const ReplayCall& call) {
  const int64_t replica = ReplicaOf(call);
  if (replica < 0 || !call.complete()) {
    if (result_.errors == 0) std::cerr << "fleet_replay: " << call.Describe() << std::endl;
    return Fail(call.index());
  }
  Served& served = served_[call.index()];
  served.replica = replica;
  served.ended = clock_.Now();
  result_.replies[replica].Add(call.usage());
  const std::vector<int64_t>& turns = turns_[call.index()];
  for (size_t sample = 0; sample < turns.size(); ++sample) {
    prompts_[turns[sample]] = call.Transcript(static_cast<int64_t>(sample));
    ready_.push_back(turns[sample]);
  }
}

int64_t Replayer::ReplicaOf(const ReplayCall& call) {
  const SimRequest& request = load_.requests[call.index()];
  const int64_t replica = call.replica();
  if (replica < 0) {
    result_.expected_tokens += call.placement().predicted_hit_tokens();
    return fleet_.IndexOf(call.placement().replica());
  }
  open_samples_[replica] -= static_cast<double>(request.n);
  caches_[replica].End(request);
  options_.policy->Finished(request, replica);
  return replica;
}

void Replayer::Fail(int64_t index) {
  ++result_.errors;
  for (const int64_t turn : turns_[index]) Fail(turn);
}

// Over the time in which anything is open.
double Replayer::OpenMaxOverMean() const {
  std::vector<std::tuple<absl::Duration, int64_t, double>> changes;  // when, replica, tokens
  for (size_t i = 0; i < served_.size(); ++i) {
    const SimRequest& request = load_.requests[i];
    const auto tokens = static_cast<double>(request.n * request.output_tokens);
    if (served_[i].replica < 0) continue;
    changes.emplace_back(served_[i].began, served_[i].replica, tokens);
    changes.emplace_back(served_[i].ended, served_[i].replica, -tokens);
  }
  std::sort(changes.begin(), changes.end());
  std::vector<double> open(fleet_.size());
  double busy_s = 0, imbalance_s = 0;
  for (size_t i = 0; i + 1 < changes.size(); ++i) {
    const auto& [at, replica, tokens] = changes[i];
    open[replica] += tokens;
    if (*std::max_element(open.begin(), open.end()) <= 0) continue;
    const double seconds = absl::ToDoubleSeconds(std::get<0>(changes[i + 1]) - at);
    busy_s += seconds;
    imbalance_s += seconds * MaxOverMean(open);
  }
  return busy_s == 0 ? 0 : imbalance_s / busy_s;
}

}  // namespace

void Shorten(int64_t divisor, SimLoad& load) {
  CHECK_EQ(kSimBlockTokens % divisor, 0);
  for (SimRequest& request : load.requests) {
    CHECK(divisor == 1 || request.after < 0);
    request.prompt_tokens = std::max<int64_t>(1, request.prompt_tokens / divisor);
    request.output_tokens = std::max<int64_t>(1, request.output_tokens / divisor);
  }
}

ReplayResult Replay(const SimLoad& load, const ReplayOptions& options, ReplayFleet& fleet) {
  return Replayer(load, options, fleet).Run();
}

}  // namespace coppice::bench
