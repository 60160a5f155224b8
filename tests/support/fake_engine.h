// FakeEngine: an Engine without model or thread. It records what it was asked; the test answers by
// calling the recorded sinks and replies itself, from any thread.
#pragma once

#include <atomic>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "server/engine/engine.h"

namespace coppice {

class FakeEngine final : public Engine {
 public:
  struct Submitted {
    GenerateRequest request;
    std::shared_ptr<GenerateSink> sink;
  };

  struct HeldScore {
    ScoreRequest request;
    Reply<ScoreResult> reply;
  };

  absl::Status Run() override { return absl::OkStatus(); }
  void Stop() override {}
  bool StepForTest() override { return false; }
  PolicyVersion policy_version() const override { return PolicyVersion{version.load()}; }

  absl::Status Submit(GenerateRequest request, std::shared_ptr<GenerateSink> sink) override {
    absl::MutexLock lock(&mutex_);
    if (!submit_status.ok()) return submit_status;
    submitted_.push_back({std::move(request), std::move(sink)});
    return absl::OkStatus();
  }
  void Wake() override {
    absl::MutexLock lock(&mutex_);
    ++wakes_;
  }

  // Blocks until the n-th call has arrived (from 0) and moves it out.
  Submitted TakeSubmitted(size_t n = 0) {
    absl::MutexLock lock(&mutex_);
    const auto arrived = [this, n] {
      mutex_.AssertReaderHeld();  // the analysis looks at a lambda for itself
      return submitted_.size() > n;
    };
    mutex_.Await(absl::Condition(&arrived));
    return std::move(submitted_[n]);
  }
  // With hold_scores: blocks until the first Score has arrived and moves it out.
  HeldScore TakeScore() {
    absl::MutexLock lock(&mutex_);
    const auto arrived = [this] {
      mutex_.AssertReaderHeld();
      return !scores_.empty();
    };
    mutex_.Await(absl::Condition(&arrived));
    return std::move(scores_[0]);
  }
  size_t num_submitted() {
    absl::MutexLock lock(&mutex_);
    return submitted_.size();
  }
  int wakes() {
    absl::MutexLock lock(&mutex_);
    return wakes_;
  }
  // Blocks until Wake was called more than n times.
  void AwaitWakes(int n) {
    absl::MutexLock lock(&mutex_);
    const auto woken = [this, n] {
      mutex_.AssertReaderHeld();
      return wakes_ > n;
    };
    mutex_.Await(absl::Condition(&woken));
  }

  void Abort(std::string request_id, std::string session_id, Reply<AbortResult> reply) override {
    aborted_request_id = std::move(request_id);
    aborted_session_id = std::move(session_id);
    reply(AbortResult{.aborted = 1});
  }
  void Warm(GenerateRequest request, Reply<WarmResult> reply) override {
    WarmResult result;
    result.usage.prompt_tokens = result.usage.computed_tokens =
        static_cast<int32_t>(request.prompt.size());
    reply(result);
  }
  void Score(ScoreRequest request, Reply<ScoreResult> reply) override {
    if (hold_scores) {
      absl::MutexLock lock(&mutex_);
      scores_.push_back({std::move(request), std::move(reply)});
      return;
    }
    ScoreResult result{.policy_version = policy_version()};
    for (const TrainGroup& group : request.groups) {
      for (const TrainSample& sample : group.samples) {
        result.samples.push_back({std::vector<float>(sample.tokens.size(), -1.0f), 0.5, 0.0});
      }
    }
    reply(std::move(result));
  }
  void TrainStep(TrainStepRequest request, Reply<TrainStepResult> reply) override {
    Step(std::move(request), std::move(reply));
  }
  void ForwardBackward(TrainStepRequest request, Reply<TrainStepResult> reply) override {
    Step(std::move(request), std::move(reply));
  }
  void OptimStep(TrainStepRequest request, Reply<TrainStepResult> reply) override {
    Step(std::move(request), std::move(reply));
  }
  void GetRollout(std::string id, std::string, Reply<Rollout> reply) override {
    reply(absl::NotFoundError("rollout " + id + ": not among the retained ones"));
  }
  void PutRollout(std::string, Rollout, Reply<PolicyVersion> reply) override {
    reply(policy_version());
  }
  void SaveCheckpoint(std::string directory, Reply<PolicyVersion> reply) override {
    checkpoint_path = std::move(directory);
    reply(policy_version());
  }
  void LoadCheckpoint(std::string directory, Reply<PolicyVersion> reply) override {
    checkpoint_path = std::move(directory);
    reply(absl::NotFoundError("checkpoint not loaded: want it, got nothing; save one first"));
  }
  void GetStatus(Reply<EngineStatus> reply) override {
    EngineStatus status;
    status.device = "fake";
    status.policy_version = policy_version();
    status.paused = paused;
    reply(status);
  }
  void FlushCache(Reply<int64_t> reply) override { reply(3); }
  void Pause(RunningRequests running, bool, Reply<int64_t> reply) override {
    if (!control_status.ok()) return reply(control_status);
    paused = true;
    paused_with = running;
    reply(2);
  }
  void Resume(Reply<int64_t> reply) override {
    if (!control_status.ok()) return reply(control_status);
    paused = false;
    reply(2);
  }
  void Drain(Reply<int64_t> reply) override {
    ++drains;
    if (!control_status.ok()) return reply(control_status);
    reply(0);
  }

  // Set before the server starts or between calls.
  absl::Status submit_status;
  absl::Status step_status;
  absl::Status control_status;  // of Pause, Resume and Drain
  int drains = 0;
  bool hold_scores = false;  // the test answers them
  std::atomic<uint64_t> version{7};
  std::atomic<bool> paused{false};
  RunningRequests paused_with = RunningRequests::kDrain;
  std::string aborted_request_id, aborted_session_id, checkpoint_path;
  std::vector<TrainStepRequest> steps;

 private:
  void Step(TrainStepRequest request, Reply<TrainStepResult> reply) {
    steps.push_back(std::move(request));
    if (!step_status.ok()) return reply(step_status);
    TrainStepResult result;
    result.policy_version = PolicyVersion{++version};
    result.batch.loss = 0.25;
    reply(result);
  }

  absl::Mutex mutex_;
  std::vector<Submitted> submitted_ ABSL_GUARDED_BY(mutex_);
  std::vector<HeldScore> scores_ ABSL_GUARDED_BY(mutex_);
  int wakes_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace coppice
