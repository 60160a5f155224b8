// EngineImpl: the engine thread. Takes requests and commands from its queues, gives the policy gate
// and the generator their turns, and sleeps on a bell when there is nothing to do. The public calls
// run on any thread and touch only the queues, the atomics and what never changes; everything else
// belongs to the engine thread.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "server/engine/command_queue.h"
#include "server/engine/engine.h"
#include "server/engine/generator.h"
#include "server/engine/policy_gate.h"
#include "server/engine/validate.h"

namespace coppice {

class EngineImpl final : public Engine {
 public:
  static absl::StatusOr<std::unique_ptr<Engine>> Create(EngineOptions options, Model& model,
                                                        const Decoder& decoder, Metrics& metrics,
                                                        const Clock& clock);

  absl::Status Run() override;
  void Stop() override;
  bool StepForTest() override;
  PolicyVersion policy_version() const override { return PolicyVersion{policy_version_.load()}; }

  absl::Status Submit(GenerateRequest request, std::shared_ptr<GenerateSink> sink) override;
  void Wake() override { bell_.Ring(); }
  void Abort(std::string request_id, std::string session_id, Reply<AbortResult> reply) override;
  void Warm(GenerateRequest request, Reply<WarmResult> reply) override;
  void Score(ScoreRequest request, Reply<ScoreResult> reply) override;
  void TrainStep(TrainStepRequest request, Reply<TrainStepResult> reply) override;
  void ForwardBackward(TrainStepRequest request, Reply<TrainStepResult> reply) override;
  void OptimStep(TrainStepRequest request, Reply<TrainStepResult> reply) override;
  void GetRollout(std::string id, std::string tenant_salt, Reply<Rollout> reply) override;
  void PutRollout(std::string id, Rollout rollout, Reply<PolicyVersion> reply) override;
  void SaveCheckpoint(std::string directory, Reply<PolicyVersion> reply) override;
  void LoadCheckpoint(std::string directory, Reply<PolicyVersion> reply) override;
  void GetStatus(Reply<EngineStatus> reply) override;
  void FlushCache(Reply<int64_t> reply) override;
  void Pause(RunningRequests running, bool abort, Reply<int64_t> reply) override;
  void Resume(Reply<int64_t> reply) override;
  void Drain(Reply<int64_t> reply) override;

 private:
  // Called with OK to be carried out, else to answer with the error.
  using Command = std::function<void(const absl::Status&)>;
  enum class Kind { kWork, kControl };  // work is refused while draining
  // Of Pause(drain) or Drain, and what the answer will be.
  struct Waiter {
    Reply<int64_t> reply;
    int64_t requests = 0;
  };

  EngineImpl(const EngineOptions& options, Model& model, const Decoder& decoder, Metrics& metrics,
             const Clock& clock);

  // ---- Any thread
  // Queues `work(reply)`, or answers with the reason why not.
  template <typename T, typename Work>
  void Post(Kind kind, Reply<T> reply, Work work);
  void PostStep(StepKind kind, TrainStepRequest request, Reply<TrainStepResult> reply);
  absl::Status CheckOpen() const;
  // Takes a place in the queue. RESOURCE_EXHAUSTED, UNAVAILABLE.
  absl::Status Queue(std::unique_ptr<Group> group);
  std::unique_ptr<Group> MakeGroup(GenerateRequest request);
  void SeedSamples(Group& group) const;

  // ---- Engine thread
  // One turn. True if anything happened; a Status is a device error.
  absl::StatusOr<bool> Turn();
  bool TakeArrivals();
  // Lands what is in flight if there are commands, or work for the policy gate.
  absl::StatusOr<bool> RunCommands();
  // Answers Pause(drain) and Drain once their condition holds.
  bool AnswerWaiting();
  // Whoever waits for the pause hears why it does not come.
  void EndPause(absl::string_view why);
  void StartPause(RunningRequests running, bool abort, Reply<int64_t> reply);
  EngineStatus Status() const;
  absl::Duration IdleTime() const;
  // A device error: says so, then shuts down.
  void Fail(const absl::Status& status);
  // Answers everybody with `status`, now and from now on.
  void Shutdown(const absl::Status& status);

  const EngineOptions options_;
  const Model& model_;
  const Decoder& decoder_;
  Metrics& metrics_;
  const Clock& clock_;
  GenerateLimits limits_;
  uint64_t seed_ = 0;

  // ---- Shared
  std::atomic<uint64_t> next_id_{1};
  std::atomic<int64_t> queued_{0};  // places taken, see QueueSlot
  std::atomic<uint64_t> policy_version_{0};
  std::atomic<bool> stop_{false};
  std::atomic<bool> draining_{false};
  BoundedQueue<std::unique_ptr<Group>> arrivals_;
  BoundedQueue<Command> commands_;
  Doorbell bell_;

  // ---- Engine thread
  std::unique_ptr<Generator> generator_;
  std::unique_ptr<PolicyGate> gate_;
  bool paused_ = false;
  bool pausing_ = false;  // Pause(drain): running requests finish first
  std::vector<Waiter> pausers_;
  std::vector<Waiter> drainers_;
};

}  // namespace coppice
