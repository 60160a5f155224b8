// Engine: the one thread that owns everything mutable - scheduler, radix cache, running requests,
// policy, trainer. RPC reactors talk to it through bounded queues and never block; answers come
// back by callback on the engine thread.
//
// One step reads as: admit arrivals and commands; plan (a pure function); match, allocate, publish;
// build the TokenBatch; run the decoder; sample; append, stream out, retire.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/clock.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "server/engine/request.h"
#include "server/metrics/metrics.h"
#include "trainer/trainer.h"

namespace coppice {

// A command's answer; called exactly once, on the engine thread (or the caller's, if refused at
// once). Must not block.
template <typename T>
using Reply = std::function<void(absl::StatusOr<T>)>;

enum class RunningRequests { kDrain, kRetract, kKeep };

struct RolloutSample {
  std::vector<int32_t> tokens;
  std::vector<float> sampler_logprobs;  // one per token

  bool operator==(const RolloutSample&) const = default;
};

// A retained group.
struct Rollout {
  std::vector<int32_t> prompt;
  std::vector<RolloutSample> samples;
  float temperature = 1;            // of the sampler log-probs
  PolicyVersion oldest_version{0};  // that drew any of its tokens
  std::string tenant_salt;          // of the request that drew it; nobody else may train on it
  std::weak_ptr<const KeptPrompt> kept_prompt;
};

struct TrainStepRequest {
  std::string step_id;      // required; a repeat returns the first answer
  std::string tenant_salt;  // of the caller: rollouts of others are not found
  ForwardBackwardRequest batch;
  // Parallel to batch.groups: non-empty rollout_id = prompt, tokens, sampler and old log-probs come
  // from the rollout, and sample i of the group takes rollout_samples[group][i].
  std::vector<std::string> rollout_ids;
  std::vector<std::vector<int32_t>> rollout_samples;
  AdamConfig optim;
  RunningRequests running = RunningRequests::kDrain;
  bool durable = false;
  std::optional<uint64_t> expected_policy_version;
  int32_t max_policy_lag = 0;
};

struct TrainStepResult {
  PolicyVersion policy_version{0};
  bool skipped = false;
  std::string skip_reason;
  double grad_norm = 0;
  ForwardBackwardResult batch;  // phases include optimizer
  bool repeated = false;        // answered from the idempotency record
};

struct ScoreRequest {
  std::vector<TrainGroup> groups;
  float temperature = 1;
  std::string tenant_salt;  // of the caller: only its cached prompts are read
  // Any thread. Asked when its turn comes: if the caller is gone by then, nothing is computed.
  // Optional.
  std::function<bool()> abandoned;
};

struct ScoreResult {
  std::vector<SampleResult> samples;
  PolicyVersion policy_version{0};
};

struct AbortResult {
  int32_t aborted = 0;  // requests; their blocks are free when this arrives
};

struct WarmResult {
  Usage usage;
  PolicyVersion policy_version{0};
};

struct EngineStatus {
  std::string model;
  std::string device;
  PolicyVersion policy_version{0};
  int64_t num_parameters = 0;
  bool pending_gradients = false;
  bool optimizer_state = false;
  int64_t queued_requests = 0, running_requests = 0, running_samples = 0;
  CacheStats cache;
  int64_t rollouts = 0;
  bool paused = false, draining = false;
  int64_t max_context = 0;
};

struct EngineOptions {
  int64_t block_tokens = 16;
  int64_t num_blocks = 0;        // KV pool
  int64_t max_batch_rows = 512;  // tokens of one step, prefill chunks included
  int64_t max_running_samples = 256;
  bool overlap = false;  // queue a decoding step before the one before it is read, see Generator
  int64_t max_queued_requests = 1024;  // full -> RESOURCE_EXHAUSTED at once
  int64_t max_group_size = 256;
  int64_t max_context = 0;  // 0 = the model's
  // A reader that leaves no room for so long loses its stream: RESOURCE_EXHAUSTED.
  absl::Duration max_reader_stall = absl::Seconds(60);
  int64_t max_rollouts = 4096;  // retained; the oldest goes first
  // Device memory for what retained requests leave of their prompts, so that an update under the
  // same policy does not run them forward; 0 = off.
  int64_t prompt_state_bytes = 0;
  int64_t max_step_records = 1024;  // idempotency answers kept
  uint64_t seed = 0;                // of drawn seeds; 0 = from the OS
  // Told of the device error that ends the loop, on the engine thread, before anybody is answered
  // with it. Optional.
  std::function<void(const absl::Status&)> on_device_error;
  Trainer::Options trainer;
};

class Engine {
 public:
  // Borrows model, decoder, metrics, clock; allocates the KV pool. Starts no thread.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(const EngineOptions& options, Model& model,
                                                        const Decoder& decoder, Metrics& metrics,
                                                        const Clock& clock);
  virtual ~Engine() = default;

  // Runs the loop until Stop(), on the calling thread. Returns the device error that made it stop
  // early, if any; every open request has then been answered.
  virtual absl::Status Run() = 0;
  // Any thread. Ends the loop after the current step; open requests end with UNAVAILABLE.
  virtual void Stop() = 0;
  // One iteration of Run for tests: false if there was nothing to do.
  virtual bool StepForTest() = 0;

  // The version of the weights as of the last committed update. Any thread.
  virtual PolicyVersion policy_version() const = 0;

  // ---- Any thread, never block. A refused call's sink or reply is not called; the Status says
  // why. INVALID_ARGUMENT (bad request), RESOURCE_EXHAUSTED (queue full), UNAVAILABLE (draining).
  virtual absl::Status Submit(GenerateRequest request, std::shared_ptr<GenerateSink> sink) = 0;
  // Wakes the loop: a sink has room again or was cancelled.
  virtual void Wake() = 0;
  virtual void Abort(std::string request_id, std::string session_id, Reply<AbortResult> reply) = 0;
  virtual void Warm(GenerateRequest request, Reply<WarmResult> reply) = 0;
  virtual void Score(ScoreRequest request, Reply<ScoreResult> reply) = 0;
  virtual void TrainStep(TrainStepRequest request, Reply<TrainStepResult> reply) = 0;
  virtual void ForwardBackward(TrainStepRequest request,
                               Reply<TrainStepResult> reply) = 0;  // optim is ignored
  virtual void OptimStep(TrainStepRequest request,
                         Reply<TrainStepResult> reply) = 0;  // batch is ignored
  // NOT_FOUND: unknown, dropped, or of another tenant.
  virtual void GetRollout(std::string id, std::string tenant_salt, Reply<Rollout> reply) = 0;
  // Keeps a rollout of another daemon, checked by the caller, under `id` for its tenant; answers
  // with the current version. ALREADY_EXISTS: with other content.
  virtual void PutRollout(std::string id, Rollout rollout, Reply<PolicyVersion> reply) = 0;
  virtual void SaveCheckpoint(std::string directory, Reply<PolicyVersion> reply) = 0;
  virtual void LoadCheckpoint(std::string directory, Reply<PolicyVersion> reply) = 0;
  virtual void GetStatus(Reply<EngineStatus> reply) = 0;
  virtual void FlushCache(Reply<int64_t> reply) = 0;  // blocks freed
  virtual void Pause(RunningRequests running, bool abort,
                     Reply<int64_t> reply) = 0;  // requests affected
  virtual void Resume(Reply<int64_t> reply) = 0;
  // Refuses new work from now on; replies when nothing runs or waits.
  virtual void Drain(Reply<int64_t> reply) = 0;
};

}  // namespace coppice
