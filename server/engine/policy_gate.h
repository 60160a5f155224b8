// PolicyGate: everything that reads or changes the policy as a whole - TrainStep and its two
// halves, Score, checkpoints - in the order of arrival, between generation steps. Decides what
// becomes of running requests when the weights change:
//   drain    they finish first; new ones wait in the queue
//   retract  they keep their tokens, give back their KV and prefill again under the new weights
//   keep     they keep their KV too; the version of each token is in its chunk. Prefills in flight
//   start again.
// After the version rises the cache has a new namespace, so nothing of the old policy is matched
// (P1).
//
// Idempotency: the answer to a step_id (per kind of call) is kept, at most max_step_records; a
// repeat gets it with `repeated`, also while the first is still running. Failed steps leave no
// record: a retry is a new attempt. On error nothing has changed, with one exception that the
// message names: a durable step whose checkpoint failed has been applied; its repeat tries the
// checkpoint again.
//
// Owner and thread: Engine, on the engine thread. A Status from Step is a device error.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/engine/engine.h"
#include "server/engine/generator.h"
#include "server/engine/step_log.h"
#include "server/engine/step_records.h"
#include "server/metrics/metrics.h"
#include "trainer/trainer.h"

namespace coppice {

class PolicyGate {
 public:
  struct Options {
    std::string step_log_dir;  // of durable steps; empty = refused
    int64_t max_step_records = 1024;
  };
  // Borrows generator and metrics.
  PolicyGate(const Options& options, std::unique_ptr<Trainer> trainer, Generator& generator,
             Metrics& metrics);

  // Loads the newest durable step and its answers, if step_log_dir has one. DATA_LOSS and the like
  // if it cannot be read.
  absl::Status Resume();

  void Submit(StepKind kind, TrainStepRequest request, Reply<TrainStepResult> reply);
  // Prompts that the cache holds for the tenant under the current policy are not run.
  void Score(ScoreRequest request, Reply<ScoreResult> reply);
  void SaveCheckpoint(std::string directory, Reply<PolicyVersion> reply);
  void LoadCheckpoint(std::string directory, Reply<PolicyVersion> reply);

  // Runs the first operation if its turn has come; `paused`: running requests cannot finish now.
  // True if one ran.
  absl::StatusOr<bool> Step(bool paused);
  // New requests wait: the first operation drains.
  bool holds_admission() const;
  bool idle() const { return operations_.empty(); }
  // Answers everything that waits with `status`.
  void Fail(const absl::Status& status);

  const Trainer& trainer() const { return *trainer_; }

 private:
  struct Operation {
    bool drains = false;                            // running requests must have finished before
    std::function<absl::Status()> run;              // answers; returns what it answered
    std::function<void(const absl::Status&)> fail;  // answers with an error instead
  };
  void Add(Operation operation);
  // Answers a repeat. False if the step is not known.
  bool AnswerRepeat(StepKind kind, const TrainStepRequest& request, Reply<TrainStepResult>& reply);
  void AddStep(StepKind kind, TrainStepRequest request, Reply<TrainStepResult> reply);
  // Applies the step and answers it. Returns the status of the answer.
  absl::Status RunAndAnswer(StepKind kind, TrainStepRequest request);
  absl::StatusOr<TrainStepResult> RunStep(StepKind kind, TrainStepRequest request);
  // Fills what is cached into the request's groups.
  absl::StatusOr<ScoreResult> RunScore(ScoreRequest& request);
  absl::Status Check(StepKind kind, const TrainStepRequest& request) const;
  absl::StatusOr<ForwardBackwardResult> RunForwardBackward(const ForwardBackwardRequest& batch);
  // If it fails within a TrainStep, the step's gradients are dropped.
  absl::StatusOr<OptimStepResult> RunOptimStep(StepKind kind, const AdamConfig& config);
  // `failure`; if earlier gradients went with it, their answers are forgotten and it says so.
  absl::Status ForgetDropped(const absl::Status& failure);
  // Step records, then the checkpoint: see step_log.h.
  absl::Status SaveDurably();
  void ChangePolicy(RunningRequests running, bool replaced);
  void CountStep(StepKind kind, const TrainStepResult& result);

  const Options options_;
  std::unique_ptr<Trainer> trainer_;
  Generator& generator_;
  Metrics& metrics_;
  std::deque<Operation> operations_;
  StepRecords records_;
  StepLog log_;
  std::vector<StepRecords::Key>
      pending_forwards_;  // answered, in the gradients, not in the weights
};

}  // namespace coppice
