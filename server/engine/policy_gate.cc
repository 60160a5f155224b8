#include "server/engine/policy_gate.h"

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "trainer/validate.h"

namespace coppice {
namespace {

constexpr size_t kMaxOperations = 256;      // waiting for their turn
constexpr size_t kMaxRepeatsInFlight = 64;  // of one step

absl::Status NoStepLog() {
  return absl::FailedPreconditionError(
      "train step: durable: want a directory for durable steps, got none; start the daemon with a "
      "checkpoint directory");
}

absl::Status NotResumed(const std::string& checkpoint, const absl::Status& status) {
  return absl::Status(
      status.code(),
      absl::StrCat("durable steps not resumed: ", status.message(), "; or move ", checkpoint,
                   " away to start without them, or start with another --checkpoint_dir"));
}

}  // namespace

PolicyGate::PolicyGate(const Options& options, std::unique_ptr<Trainer> trainer,
                       Generator& generator, Metrics& metrics)
    : options_(options),
      trainer_(std::move(trainer)),
      generator_(generator),
      metrics_(metrics),
      records_(options.max_step_records),
      log_(options.step_log_dir) {}

absl::Status PolicyGate::Resume() {
  std::optional<StepLog::Entry> newest;
  if (log_.present()) {
    ASSIGN_OR_RETURN(newest, log_.Newest());
  }
  if (newest.has_value()) {
    absl::Status read = trainer_->LoadCheckpoint(newest->checkpoint);
    if (read.ok()) read = records_.ReadFile(newest->records);
    if (!read.ok()) return NotResumed(newest->checkpoint, read);
    log_.RemoveOthers(*newest);
    LOG(INFO) << "resumed policy_version=" << Raw(trainer_->policy_version())
              << " dir=" << newest->checkpoint;
  }
  generator_.SetPolicy(trainer_->policy_version(), false);
  return absl::OkStatus();
}

void PolicyGate::Add(Operation operation) {
  if (operations_.size() < kMaxOperations) {
    operations_.push_back(std::move(operation));
    return;
  }
  operation.fail(absl::ResourceExhaustedError(
      absl::StrCat("policy: ", operations_.size(), " operations wait already; retry later")));
}

void PolicyGate::Submit(StepKind kind, TrainStepRequest request, Reply<TrainStepResult> reply) {
  if (request.step_id.empty()) {
    reply(absl::InvalidArgumentError(
        "train step: step_id: want a name that is new for each step, got none"));
    return;
  }
  if (AnswerRepeat(kind, request, reply)) return;
  // What is wrong whatever happens before its turn is refused before anyone is drained for it.
  absl::Status check = Check(kind, request);
  if (check.ok()) check = generator_.rollouts().Check(request, trainer_->policy_version());
  if (operations_.empty() && !check.ok()) {
    reply(check);
    return;
  }
  AddStep(kind, std::move(request), std::move(reply));
}

bool PolicyGate::AnswerRepeat(StepKind kind, const TrainStepRequest& request,
                              Reply<TrainStepResult>& reply) {
  StepRecords::Record* record = records_.Find({kind, request.step_id});
  if (record == nullptr) return false;
  if (!record->done) {
    if (record->waiting.size() < kMaxRepeatsInFlight) {
      record->waiting.push_back(std::move(reply));
    } else {
      reply(absl::ResourceExhaustedError(
          absl::StrCat("train step: want at most ", kMaxRepeatsInFlight,
                       " repeats of a running step, got one more; wait for its answer")));
    }
    return true;
  }
  if (request.durable && !record->durable && kind != StepKind::kForwardBackward) {
    if (const absl::Status saved = SaveDurably(); !saved.ok()) {
      reply(saved);
      return true;
    }
    record->durable = true;
  }
  TrainStepResult result = record->result;
  result.repeated = true;
  reply(std::move(result));
  return true;
}

void PolicyGate::AddStep(StepKind kind, TrainStepRequest request, Reply<TrainStepResult> reply) {
  const StepRecords::Key key{kind, request.step_id};
  records_.Begin(key, std::move(reply));
  Operation operation;
  operation.drains =
      kind != StepKind::kForwardBackward && request.running == RunningRequests::kDrain;
  operation.fail = [this, key](const absl::Status& status) { records_.Fail(key, status); };
  operation.run = [this, kind, request = std::move(request)]() mutable {
    return RunAndAnswer(kind, std::move(request));
  };
  Add(std::move(operation));
}

absl::Status PolicyGate::RunAndAnswer(StepKind kind, TrainStepRequest request) {
  const StepRecords::Key key{kind, request.step_id};
  const bool durable = request.durable && kind != StepKind::kForwardBackward;
  const absl::StatusOr<TrainStepResult> result = RunStep(kind, std::move(request));
  if (!result.ok()) {
    records_.Fail(key, result.status());
    return result.status();
  }
  CountStep(kind, *result);
  // The file of records that goes with the checkpoint must hold this step, so it is recorded first,
  // unanswered.
  std::vector<Reply<TrainStepResult>> waiting = records_.Keep(key, *result);
  if (kind == StepKind::kForwardBackward) pending_forwards_.push_back(key);
  absl::Status saved;
  if (durable) saved = SaveDurably();
  records_.Find(key)->durable = durable && saved.ok();
  TrainStepResult answer = *result;
  for (const Reply<TrainStepResult>& reply : waiting) {
    saved.ok() ? reply(answer) : reply(saved);
    answer.repeated = true;
  }
  return saved;
}

absl::Status PolicyGate::Check(StepKind kind, const TrainStepRequest& request) const {
  const PolicyVersion version = trainer_->policy_version();
  if (request.expected_policy_version.has_value() &&
      *request.expected_policy_version != Raw(version)) {
    return absl::FailedPreconditionError(absl::StrCat(
        "train step: policy version: want ", *request.expected_policy_version, ", got ",
        Raw(version), "; read the current one with GetPolicy and generate again"));
  }
  if (request.max_policy_lag < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("train step: max_policy_lag: want at least 0, got ", request.max_policy_lag));
  }
  if (kind == StepKind::kForwardBackward) return absl::OkStatus();
  if (request.durable && !log_.present()) return NoStepLog();
  return ValidateAdam(request.optim);
}

absl::StatusOr<TrainStepResult> PolicyGate::RunStep(StepKind kind, TrainStepRequest request) {
  RETURN_IF_ERROR(Check(kind, request));
  TrainStepResult result;
  if (kind != StepKind::kOptimStep) {
    RETURN_IF_ERROR(generator_.rollouts().Resolve(request, trainer_->policy_version()));
    ASSIGN_OR_RETURN(result.batch, RunForwardBackward(request.batch));
  }
  if (kind != StepKind::kForwardBackward) {
    ASSIGN_OR_RETURN(OptimStepResult optim, RunOptimStep(kind, request.optim));
    result.skipped = optim.skipped;
    result.skip_reason = std::move(optim.skip_reason);
    result.grad_norm = optim.grad_norm;
    result.batch.phases.emplace_back("optimizer", optim.seconds);
    if (!result.skipped) ChangePolicy(request.running, false);
    LOG(INFO) << "policy_step step_id=" << request.step_id
              << " policy_version=" << Raw(trainer_->policy_version())
              << " skipped=" << result.skipped << " loss=" << result.batch.loss
              << " grad_norm=" << result.grad_norm << " running=" << generator_.num_running();
  }
  result.policy_version = trainer_->policy_version();
  return result;
}

absl::StatusOr<ForwardBackwardResult> PolicyGate::RunForwardBackward(
    const ForwardBackwardRequest& batch) {
  absl::StatusOr<ForwardBackwardResult> result = trainer_->ForwardBackward(batch);
  if (!result.ok()) return ForgetDropped(result.status());
  return result;
}

absl::StatusOr<OptimStepResult> PolicyGate::RunOptimStep(StepKind kind, const AdamConfig& config) {
  absl::StatusOr<OptimStepResult> result = trainer_->OptimStep(config);
  if (result.ok()) {
    pending_forwards_.clear();
    return result;
  }
  // A repeat of a TrainStep would add its gradients again; of an OptimStep it would not.
  if (kind == StepKind::kTrainStep) RETURN_IF_ERROR(trainer_->DropGradients());
  return ForgetDropped(result.status());
}

absl::Status PolicyGate::ForgetDropped(const absl::Status& failure) {
  if (trainer_->has_pending_gradients() || pending_forwards_.empty()) return failure;
  for (const StepRecords::Key& key : pending_forwards_) records_.Forget(key);
  const size_t dropped = std::exchange(pending_forwards_, {}).size();
  return absl::Status(failure.code(),
                      absl::StrCat(failure.message(), "; the gradients of ", dropped,
                                   " earlier calls are dropped with it: repeat them"));
}

void PolicyGate::ChangePolicy(RunningRequests running, bool replaced) {
  if (running == RunningRequests::kRetract) generator_.RetractAll();
  if (running == RunningRequests::kKeep) generator_.RestartStems();
  generator_.SetPolicy(trainer_->policy_version(), replaced);
}

absl::Status PolicyGate::SaveDurably() {
  if (!log_.present()) return NoStepLog();
  const absl::StatusOr<StepLog::Entry> next = log_.Next();
  absl::Status saved = next.status();
  if (saved.ok()) saved = records_.WriteFile(next->records);
  if (saved.ok()) saved = trainer_->SaveCheckpoint(next->checkpoint);
  if (saved.ok()) {
    log_.RemoveOthers(*next);
    return saved;
  }
  LOG(ERROR) << "durable_step_not_saved policy_version=" << Raw(trainer_->policy_version())
             << " reason=\"" << saved.message() << '"';
  return absl::DataLossError(absl::StrCat(
      "train step: applied as policy version ", Raw(trainer_->policy_version()),
      " but not on disk: ", saved.message(), "; repeat the step_id to try the disk again"));
}

void PolicyGate::CountStep(StepKind kind, const TrainStepResult& result) {
  if (kind != StepKind::kForwardBackward) metrics_.train_steps.Increment();
  if (result.skipped) metrics_.train_steps_skipped.Increment();
  metrics_.train_tokens_unique.Increment(static_cast<double>(result.batch.tokens.unique));
  metrics_.train_tokens_flat.Increment(static_cast<double>(result.batch.tokens.flat));
  const auto scale = result.batch.metrics.find("gradient_scale");
  if (scale != result.batch.metrics.end()) metrics_.gradient_scale.Set(scale->second);
  metrics_.train_prompt_tokens_reused.Increment(
      static_cast<double>(result.batch.tokens.prompt_forward_skipped));
  for (const auto& [phase, seconds] : result.batch.phases) {
    metrics_.TrainPhaseSeconds(phase).Observe(seconds);
  }
}

void PolicyGate::Score(ScoreRequest request, Reply<ScoreResult> reply) {
  Operation operation;
  operation.fail = reply;
  operation.run = [this, request = std::move(request), reply = std::move(reply)]() mutable {
    absl::StatusOr<ScoreResult> result = RunScore(request);
    absl::Status status = result.status();
    reply(std::move(result));
    return status;
  };
  Add(std::move(operation));
}

absl::StatusOr<ScoreResult> PolicyGate::RunScore(ScoreRequest& request) {
  if (request.abandoned && request.abandoned()) {
    return absl::CancelledError("score: the caller is gone");
  }
  const std::vector<Lease> leases = generator_.LeaseCached(request.tenant_salt, request.groups);
  ASSIGN_OR_RETURN(std::vector<SampleResult> samples,
                   trainer_->Score(request.groups, request.temperature));
  return ScoreResult{.samples = std::move(samples), .policy_version = trainer_->policy_version()};
}

void PolicyGate::SaveCheckpoint(std::string directory, Reply<PolicyVersion> reply) {
  Operation operation;
  operation.fail = reply;
  operation.run = [this, directory = std::move(directory), reply = std::move(reply)] {
    absl::Status saved = trainer_->SaveCheckpoint(directory);
    if (saved.ok()) {
      LOG(INFO) << "checkpoint_saved dir=" << directory
                << " policy_version=" << Raw(trainer_->policy_version());
    } else {
      LOG(WARNING) << "checkpoint_not_saved dir=" << directory << " reason=\"" << saved.message()
                   << '"';
    }
    saved.ok() ? reply(trainer_->policy_version()) : reply(saved);
    return saved;
  };
  Add(std::move(operation));
}

void PolicyGate::LoadCheckpoint(std::string directory, Reply<PolicyVersion> reply) {
  Operation operation;
  operation.drains = true;
  operation.fail = reply;
  operation.run = [this, directory = std::move(directory), reply = std::move(reply)] {
    absl::Status loaded = trainer_->LoadCheckpoint(directory);
    if (loaded.ok()) {
      records_.Clear();
      pending_forwards_.clear();
      ChangePolicy(RunningRequests::kDrain, true);
      LOG(INFO) << "checkpoint_loaded dir=" << directory
                << " policy_version=" << Raw(trainer_->policy_version());
    }
    loaded.ok() ? reply(trainer_->policy_version()) : reply(loaded);
    return loaded;
  };
  Add(std::move(operation));
}

bool PolicyGate::holds_admission() const {
  return !operations_.empty() && operations_.front().drains;
}

absl::StatusOr<bool> PolicyGate::Step(bool paused) {
  if (operations_.empty()) return false;
  if (operations_.front().drains && generator_.num_running() > 0 && !paused) return false;
  Operation operation = std::move(operations_.front());
  operations_.pop_front();
  if (operation.drains && generator_.num_running() > 0) {
    operation.fail(absl::FailedPreconditionError(absl::StrCat(
        "policy: drain: ", generator_.num_running(),
        " requests are paused and cannot finish; resume first, or choose retract or keep")));
    return true;
  }
  const absl::Status status = operation.run();
  if (absl::IsInternal(status)) return status;
  return true;
}

void PolicyGate::Fail(const absl::Status& status) {
  while (!operations_.empty()) {
    Operation operation = std::move(operations_.front());
    operations_.pop_front();
    operation.fail(status);
  }
}

}  // namespace coppice
