#include <algorithm>
#include <optional>
#include <random>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/rng.h"
#include "kernels/base/status_macros.h"
#include "server/engine/engine_impl.h"

namespace coppice {
namespace {

constexpr int64_t kMaxCommands = 1024;
constexpr absl::Duration kMaxIdle = absl::Seconds(1);

absl::Status BadOption(absl::string_view name, absl::string_view want, int64_t got) {
  return absl::InvalidArgumentError(absl::StrCat("engine: ", name, ": want ", want, ", got ", got));
}

// Fills what depends on the model and checks the rest.
absl::Status Settle(EngineOptions& options, const ModelConfig& config) {
  if (options.max_context == 0) options.max_context = config.max_positions;
  options.max_group_size = std::min(options.max_group_size, options.max_running_samples);
  if (options.max_context < 2 || options.max_context > config.max_positions) {
    return BadOption("max_context", absl::StrCat("2 to the model's ", config.max_positions),
                     options.max_context);
  }
  if (options.block_tokens < 1)
    return BadOption("block_tokens", "at least 1", options.block_tokens);
  if (options.num_blocks < 1) return BadOption("num_blocks", "at least 1", options.num_blocks);
  if (options.max_batch_rows < 8) {
    return BadOption("max_batch_rows", "at least 8", options.max_batch_rows);
  }
  if (options.max_group_size < 1) {
    return BadOption("max_group_size and max_running_samples", "at least 1",
                     options.max_group_size);
  }
  for (int64_t bound :
       {options.max_queued_requests, options.max_rollouts, options.max_step_records}) {
    if (bound < 1) {
      return BadOption("max_queued_requests, max_rollouts, max_step_records", "at least 1", bound);
    }
  }
  return absl::OkStatus();
}

// The 64 bits that (seed, stream, index) stand for.
uint64_t DrawBits(uint64_t seed, uint32_t stream, uint64_t index) {
  const Philox4 bits =
      Philox(seed, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), stream, 0);
  return uint64_t{bits.v[0]} << 32 | bits.v[1];
}

constexpr uint32_t kRequestSeeds = 1;

uint64_t OsBits() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(const EngineOptions& options, Model& model,
                                                       const Decoder& decoder, Metrics& metrics,
                                                       const Clock& clock) {
  return EngineImpl::Create(options, model, decoder, metrics, clock);
}

absl::StatusOr<std::unique_ptr<Engine>> EngineImpl::Create(EngineOptions options, Model& model,
                                                           const Decoder& decoder, Metrics& metrics,
                                                           const Clock& clock) {
  RETURN_IF_ERROR(Settle(options, model.config));
  std::unique_ptr<EngineImpl> engine(new EngineImpl(options, model, decoder, metrics, clock));
  // Rollout ids of no two runs are alike, not even under one seed.
  ASSIGN_OR_RETURN(engine->generator_,
                   Generator::Create(options, model, decoder, metrics, clock, OsBits()));
  ASSIGN_OR_RETURN(std::unique_ptr<Trainer> trainer,
                   Trainer::Create(options.trainer, model, decoder, clock));
  engine->gate_ = std::make_unique<PolicyGate>(
      PolicyGate::Options{options.trainer.step_log_dir, options.max_step_records},
      std::move(trainer), *engine->generator_, metrics);
  RETURN_IF_ERROR(engine->gate_->Resume());
  engine->policy_version_ = Raw(engine->gate_->trainer().policy_version());
  engine->generator_->UpdateGauges();
  return engine;
}

EngineImpl::EngineImpl(const EngineOptions& options, Model& model, const Decoder& decoder,
                       Metrics& metrics, const Clock& clock)
    : options_(options),
      model_(model),
      decoder_(decoder),
      metrics_(metrics),
      clock_(clock),
      limits_{.vocab = model.config.vocab,
              .max_context = options.max_context,
              .max_group_size = options.max_group_size,
              .num_blocks = options.num_blocks,
              .block_tokens = options.block_tokens,
              .has_tokenizer = model.tokenizer != nullptr},
      seed_(options.seed != 0 ? options.seed : OsBits()),
      arrivals_(options.max_queued_requests),
      commands_(kMaxCommands) {}

// ---------------------------------------------------------------- the loop

absl::Status EngineImpl::Run() {
  while (!stop_.load()) {
    const absl::StatusOr<bool> changed = Turn();
    if (!changed.ok()) {
      Fail(changed.status());
      return changed.status();
    }
    if (!*changed) bell_.Wait(IdleTime());
  }
  Shutdown(absl::UnavailableError("engine: the daemon is stopping; try another one"));
  return absl::OkStatus();
}

void EngineImpl::Stop() {
  stop_ = true;
  bell_.Ring();
}

bool EngineImpl::StepForTest() {
  const absl::StatusOr<bool> changed = Turn();
  if (changed.ok()) return *changed;
  Fail(changed.status());
  return false;
}

absl::StatusOr<bool> EngineImpl::Turn() {
  const absl::Duration start = clock_.Now();
  bool changed = TakeArrivals();
  ASSIGN_OR_RETURN(const bool commanded, RunCommands());
  changed |= commanded;
  ASSIGN_OR_RETURN(const bool policy, gate_->Step(paused_));
  policy_version_ = Raw(gate_->trainer().policy_version());
  ASSIGN_OR_RETURN(
      const bool generated,
      generator_->Step({.admit = !gate_->holds_admission() && !pausing_, .run = !paused_}));
  changed |= policy | generated | AnswerWaiting();
  if (changed) {
    metrics_.step_seconds.Observe(absl::ToDoubleSeconds(clock_.Now() - start));
    generator_->UpdateGauges();
  }
  return changed;
}

bool EngineImpl::TakeArrivals() {
  std::vector<std::unique_ptr<Group>> arrivals = arrivals_.TakeAll();
  for (std::unique_ptr<Group>& group : arrivals) generator_->Enqueue(std::move(group));
  return !arrivals.empty();
}

absl::StatusOr<bool> EngineImpl::RunCommands() {
  const std::vector<Command> commands = commands_.TakeAll();
  if (commands.empty() && gate_->idle()) return false;
  const absl::Status landed = generator_->Land();
  for (const Command& command : commands) command(landed);
  RETURN_IF_ERROR(landed);
  return !commands.empty();
}

bool EngineImpl::AnswerWaiting() {
  bool answered = false;
  if (pausing_ && generator_->num_running() == 0) {
    pausing_ = false;
    paused_ = true;
    for (const Waiter& waiter : std::exchange(pausers_, {})) waiter.reply(waiter.requests);
    answered = true;
  }
  if (!drainers_.empty() && generator_->num_running() == 0 && generator_->num_waiting() == 0 &&
      queued_.load() == 0 && gate_->idle()) {
    for (const Waiter& waiter : std::exchange(drainers_, {})) waiter.reply(waiter.requests);
    answered = true;
  }
  return answered;
}

absl::Duration EngineImpl::IdleTime() const {
  return std::clamp(generator_->NextDeadline() - clock_.Now(), absl::ZeroDuration(), kMaxIdle);
}

void EngineImpl::Fail(const absl::Status& status) {
  LOG(ERROR) << "engine_failed status=\"" << status << '"';
  if (options_.on_device_error) options_.on_device_error(status);
  Shutdown(status);
}

void EngineImpl::Shutdown(const absl::Status& status) {
  arrivals_.Close();
  commands_.Close();
  TakeArrivals();
  for (const Command& command : commands_.TakeAll()) command(status);
  gate_->Fail(status);
  generator_->Fail(status);
  for (std::vector<Waiter>* waiters : {&pausers_, &drainers_}) {
    for (const Waiter& waiter : std::exchange(*waiters, {})) waiter.reply(status);
  }
  generator_->UpdateGauges();
}

// ---------------------------------------------------------------- requests, any thread

absl::Status EngineImpl::CheckOpen() const {
  if (!draining_.load()) return absl::OkStatus();
  return absl::UnavailableError("engine: draining, no new work is taken; try another daemon");
}

absl::Status EngineImpl::Submit(GenerateRequest request, std::shared_ptr<GenerateSink> sink) {
  RETURN_IF_ERROR(CheckOpen());
  RETURN_IF_ERROR(ValidateGenerate(request, limits_));
  std::unique_ptr<Group> group = MakeGroup(std::move(request));
  group->sink = std::move(sink);
  SeedSamples(*group);
  return Queue(std::move(group));
}

void EngineImpl::Warm(GenerateRequest request, Reply<WarmResult> reply) {
  absl::Status status = CheckOpen();
  if (status.ok()) status = ValidatePrompt(request, limits_);
  if (!status.ok()) {
    reply(status);
    return;
  }
  // Only whole blocks can be shared later.
  request.prompt.resize(request.prompt.size() / options_.block_tokens * options_.block_tokens);
  request.cache_skip_read = request.cache_skip_write = false;
  std::unique_ptr<Group> group = MakeGroup(std::move(request));
  group->warm = reply;
  group->samples.resize(1);
  if (status = Queue(std::move(group)); !status.ok()) reply(status);
}

std::unique_ptr<Group> EngineImpl::MakeGroup(GenerateRequest request) {
  auto group = std::make_unique<Group>();
  group->id = RequestId{next_id_.fetch_add(1)};
  group->request = std::move(request);
  group->max_response =
      std::min<int64_t>(group->request.sampling.max_tokens,
                        options_.max_context - static_cast<int64_t>(group->request.prompt.size()));
  group->arrived = clock_.Now();
  return group;
}

void EngineImpl::SeedSamples(Group& group) const {
  const GenerateRequest& request = group.request;
  group.seed = request.sampling.seed.has_value() ? *request.sampling.seed
                                                 : DrawBits(seed_, kRequestSeeds, Raw(group.id));
  group.samples.resize(request.n);
  if (!request.return_text && request.sampling.stop_strings.empty()) return;
  for (Sample& sample : group.samples) {
    sample.text =
        std::make_unique<TextStream>(model_.tokenizer.get(), request.sampling.stop_strings);
  }
}

absl::Status EngineImpl::Queue(std::unique_ptr<Group> group) {
  using PushResult = BoundedQueue<std::unique_ptr<Group>>::PushResult;
  group->slot = QueueSlot::TryTake(queued_, options_.max_queued_requests);
  const PushResult pushed = group->slot ? arrivals_.TryPush(std::move(group)) : PushResult::kFull;
  if (pushed == PushResult::kPushed) {
    bell_.Ring();
    return absl::OkStatus();
  }
  if (pushed == PushResult::kClosed) {
    return absl::UnavailableError("engine: the daemon is stopping; try another one");
  }
  metrics_.requests_rejected.Increment();
  return absl::ResourceExhaustedError(absl::StrCat(
      "generate: queue full: ", options_.max_queued_requests, " requests wait; retry later"));
}

// ---------------------------------------------------------------- commands, any thread

template <typename T, typename Work>
void EngineImpl::Post(Kind kind, Reply<T> reply, Work work) {
  if (const absl::Status open = CheckOpen(); kind == Kind::kWork && !open.ok()) {
    reply(open);
    return;
  }
  Command command = [reply, work = std::move(work)](const absl::Status& status) mutable {
    status.ok() ? work(std::move(reply)) : reply(status);
  };
  switch (commands_.TryPush(std::move(command))) {
    case BoundedQueue<Command>::PushResult::kPushed:
      bell_.Ring();
      return;
    case BoundedQueue<Command>::PushResult::kFull:
      reply(absl::ResourceExhaustedError(
          absl::StrCat("engine: ", kMaxCommands, " commands wait already; retry later")));
      return;
    case BoundedQueue<Command>::PushResult::kClosed:
      reply(absl::UnavailableError("engine: the daemon is stopping; try another one"));
      return;
  }
}

void EngineImpl::Abort(std::string request_id, std::string session_id, Reply<AbortResult> reply) {
  if (request_id.empty() && session_id.empty()) {
    reply(absl::InvalidArgumentError("abort: want a request_id or a session_id, got neither"));
    return;
  }
  Post(Kind::kControl, std::move(reply),
       [this, request_id = std::move(request_id),
        session_id = std::move(session_id)](const Reply<AbortResult>& answer) {
         const int64_t aborted = generator_->Abort(request_id, session_id);
         answer(AbortResult{.aborted = static_cast<int32_t>(aborted)});
       });
}

void EngineImpl::PostStep(StepKind kind, TrainStepRequest request, Reply<TrainStepResult> reply) {
  Post(Kind::kWork, std::move(reply),
       [this, kind, request = std::move(request)](Reply<TrainStepResult> answer) mutable {
         gate_->Submit(kind, std::move(request), std::move(answer));
       });
}

void EngineImpl::TrainStep(TrainStepRequest request, Reply<TrainStepResult> reply) {
  PostStep(StepKind::kTrainStep, std::move(request), std::move(reply));
}

void EngineImpl::ForwardBackward(TrainStepRequest request, Reply<TrainStepResult> reply) {
  PostStep(StepKind::kForwardBackward, std::move(request), std::move(reply));
}

void EngineImpl::OptimStep(TrainStepRequest request, Reply<TrainStepResult> reply) {
  PostStep(StepKind::kOptimStep, std::move(request), std::move(reply));
}

void EngineImpl::Score(ScoreRequest request, Reply<ScoreResult> reply) {
  Post(Kind::kWork, std::move(reply),
       [this, request = std::move(request)](Reply<ScoreResult> answer) mutable {
         gate_->Score(std::move(request), std::move(answer));
       });
}

void EngineImpl::GetRollout(std::string id, std::string tenant_salt, Reply<Rollout> reply) {
  Post(Kind::kControl, std::move(reply),
       [this, id = std::move(id), tenant_salt = std::move(tenant_salt)](
           const Reply<Rollout>& answer) { answer(generator_->rollouts().Get(id, tenant_salt)); });
}

void EngineImpl::PutRollout(std::string id, Rollout rollout, Reply<PolicyVersion> reply) {
  Post(Kind::kWork, std::move(reply),
       [this, id = std::move(id),
        rollout = std::move(rollout)](const Reply<PolicyVersion>& answer) mutable {
         const absl::Status put = generator_->rollouts().Put(id, std::move(rollout));
         put.ok() ? answer(gate_->trainer().policy_version()) : answer(put);
       });
}

void EngineImpl::SaveCheckpoint(std::string directory, Reply<PolicyVersion> reply) {
  Post(Kind::kControl, std::move(reply),
       [this, directory = std::move(directory)](Reply<PolicyVersion> answer) {
         gate_->SaveCheckpoint(directory, std::move(answer));
       });
}

void EngineImpl::LoadCheckpoint(std::string directory, Reply<PolicyVersion> reply) {
  Post(Kind::kWork, std::move(reply),
       [this, directory = std::move(directory)](Reply<PolicyVersion> answer) {
         gate_->LoadCheckpoint(directory, std::move(answer));
       });
}

void EngineImpl::GetStatus(Reply<EngineStatus> reply) {
  Post(Kind::kControl, std::move(reply),
       [this](const Reply<EngineStatus>& answer) { answer(Status()); });
}

void EngineImpl::FlushCache(Reply<int64_t> reply) {
  Post(Kind::kControl, std::move(reply),
       [this](const Reply<int64_t>& answer) { answer(generator_->kv().cache().Flush()); });
}

void EngineImpl::Pause(RunningRequests running, bool abort, Reply<int64_t> reply) {
  Post(Kind::kControl, std::move(reply), [this, running, abort](Reply<int64_t> answer) {
    StartPause(running, abort, std::move(answer));
  });
}

void EngineImpl::Resume(Reply<int64_t> reply) {
  Post(Kind::kControl, std::move(reply), [this](const Reply<int64_t>& answer) {
    EndPause("resumed");
    LOG(INFO) << "unpaused running=" << generator_->num_running();
    answer(generator_->num_running() + generator_->num_waiting());
  });
}

void EngineImpl::Drain(Reply<int64_t> reply) {
  draining_ = true;
  Post(Kind::kControl, std::move(reply), [this](Reply<int64_t> answer) {
    LOG(INFO) << "draining running=" << generator_->num_running()
              << " waiting=" << generator_->num_waiting();
    EndPause("drained");
    drainers_.push_back({std::move(answer), generator_->num_running() + generator_->num_waiting()});
  });
}

// ---------------------------------------------------------------- commands, engine thread

void EngineImpl::EndPause(absl::string_view why) {
  paused_ = pausing_ = false;
  for (const Waiter& waiter : std::exchange(pausers_, {})) {
    waiter.reply(absl::AbortedError(
        absl::StrCat("pause: ", why, " before the running requests had finished")));
  }
}

void EngineImpl::StartPause(RunningRequests running, bool abort, Reply<int64_t> reply) {
  if (const absl::Status open = CheckOpen(); !open.ok()) {
    reply(open);
    return;
  }
  int64_t affected = generator_->num_running();
  if (abort) {
    affected = generator_->EndRunning();
  } else if (running == RunningRequests::kRetract) {
    generator_->RetractAll();
  } else if (running == RunningRequests::kDrain) {
    pausing_ = true;
    pausers_.push_back({std::move(reply), affected});
    return;
  }
  paused_ = true;
  LOG(INFO) << "paused affected=" << affected;
  reply(affected);
}

EngineStatus EngineImpl::Status() const {
  EngineStatus status;
  status.model = model_.config.name;
  status.device = decoder_.ops().Info().name;
  status.policy_version = gate_->trainer().policy_version();
  status.num_parameters = NumParameters(model_.config);
  status.pending_gradients = gate_->trainer().has_pending_gradients();
  status.optimizer_state = gate_->trainer().has_optimizer_state();
  status.queued_requests = generator_->num_waiting();
  status.running_requests = generator_->num_running();
  status.running_samples = generator_->num_running_samples();
  status.cache = generator_->kv().cache().Stats();
  status.rollouts = generator_->rollouts().size();
  status.paused = paused_;
  status.draining = draining_.load();
  status.max_context = options_.max_context;
  return status;
}

}  // namespace coppice
