#include "server/daemon.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/model_check.h"
#include "kernels/model/row_equality.h"
#include "server/compute_type.h"
#include "server/engine/runner.h"
#include "server/port_file.h"
#include "server/rpc/services.h"

namespace coppice {
namespace {

constexpr absl::Duration kStopGrace = absl::Seconds(5);        // for the step in progress
constexpr absl::Duration kAskAgain = absl::Milliseconds(100);  // a refused drain
constexpr absl::Duration kFlushGrace = absl::Seconds(1);       // for answers on their way out

ExitCode Fail(ExitCode code, absl::string_view event, const absl::Status& status) {
  LOG(ERROR) << event << " exit_code=" << static_cast<int>(code) << ' ' << status.message();
  return code;
}

absl::StatusOr<Model> LoadOrMakeModel(const Config& config, ops::Ops& ops) {
  if (!config.model.empty()) return LoadModel(config.model, ops);
  ASSIGN_OR_RETURN(const ModelConfig geometry, NamedGeometry(config.model_geometry));
  return RandomModel(geometry, config.seed, ops);
}

}  // namespace

Daemon::~Daemon() {
  readiness_.SetListener(nullptr);
  if (rpc_ != nullptr) rpc_->Shutdown(absl::ZeroDuration());
  http_.reset();
}

ExitCode Daemon::Run() {
  LOG(INFO) << "start " << ToString(config_);
  if (absl::Status s = MakeStepLogDir(); !s.ok()) {
    return Fail(ExitCode::kBadFlags, "start_failed", s);
  }
  if (absl::Status s = StartHttp(); !s.ok()) return Fail(ExitCode::kPortTaken, "start_failed", s);
  // Not before: a second process with these flags has ended above, and the first one's file stays.
  if (absl::Status s = RemovePortFile(config_.port_file); !s.ok()) {
    return Fail(ExitCode::kRuntimeError, "start_failed", s);
  }
  const absl::StatusOr<ComputeType> compute = ChooseComputeType(config_);
  if (!compute.ok()) return Fail(ExitCode::kModelError, "load_failed", compute.status());
  if (absl::Status s = CheckGradientType(config_, *compute); !s.ok()) {
    return Fail(ExitCode::kBadFlags, "start_failed", s);
  }
  if (absl::Status s = OpenDevice(*compute); !s.ok()) {
    return Fail(ExitCode::kDeviceError, "start_failed", s);
  }
  if (absl::Status s = Load(*compute); !s.ok()) {
    return Fail(absl::IsInternal(s) ? ExitCode::kDeviceError : ExitCode::kModelError, "load_failed",
                s);
  }
  events_ = std::make_unique<LifeEvents>();
  engine_thread_ = std::thread([this] {
    engine_status_ = engine_->Run();
    engine_ended_ = true;
    events_->Post();
  });
  absl::Status status = StartRpc();
  if (!status.ok()) {
    StopEngine();
    return Fail(ExitCode::kPortTaken, "start_failed", status);
  }
  status = AnnounceReady();
  if (!status.ok()) {
    StopEngine();
    return Fail(ExitCode::kRuntimeError, "start_failed", status);
  }
  return Serve();
}

absl::Status Daemon::MakeStepLogDir() {
  if (config_.checkpoint_dir.empty()) return absl::OkStatus();
  step_log_dir_ = config_.checkpoint_dir + "/" + kDurableSteps;
  std::error_code error;
  std::filesystem::create_directories(step_log_dir_, error);
  if (!error) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("checkpoint directory unusable: want ",
                                                 step_log_dir_, " writable, got ", error.message(),
                                                 "; change --checkpoint_dir"));
}

absl::Status Daemon::StartHttp() {
  HttpServer::Options options;
  options.host = config_.host;
  options.port = static_cast<int>(config_.http_port);
  options.metrics = [this] { return metrics_.Serialize(); };
  options.not_ready_reason = [this] { return readiness_.NotReadyReason(); };
  options.healthy = [this] { return !readiness_.failed(); };
  ASSIGN_OR_RETURN(http_, HttpServer::Start(std::move(options)));
  return absl::OkStatus();
}

absl::Status Daemon::OpenDevice(const ComputeType& compute) {
  ASSIGN_OR_RETURN(ops_, make_ops_(config_, compute.dtype));
  return absl::OkStatus();
}

absl::Status Daemon::Load(const ComputeType& compute) {
  const ops::DeviceInfo device = ops_->Info();  // with nothing of ours on it
  ASSIGN_OR_RETURN(model_, LoadOrMakeModel(config_, *ops_));
  LOG(INFO) << "model_loaded device=\"" << device.name
            << "\" compute_dtype=" << Name(device.compute_dtype) << " because=\"" << compute.because
            << "\" " << model_.config.ToString()
            << " tokenizer=" << (model_.tokenizer != nullptr ? "yes" : "no");
  if (device.kind == DeviceKind::kCpu && config_.compute_dtype != "auto") {
    LOG(WARNING) << "compute_dtype_ignored want=" << config_.compute_dtype
                 << " got=f32 note=\"the cpu computes in f32\"";
  }
  ASSIGN_OR_RETURN(decoder_, Decoder::Create(model_.config, *ops_));
  RETURN_IF_ERROR(CheckModelRuns(*decoder_, model_.params, config_.block_tokens));
  const int64_t workspace_bytes =
      Runner::WorkspaceBytes(*decoder_, config_.max_batch_rows, config_.max_running_samples);
  ASSIGN_OR_RETURN(memory_, PlanMemory(config_, model_.config, device, workspace_bytes));
  LOG(INFO) << "memory_plan " << memory_.ToString() << " device_mib=" << (device.total_bytes >> 20)
            << " free_mib=" << (device.free_bytes >> 20)
            << " note=\"gradients, optimizer and activations from the first training step on\"";
  if (memory_.total_bytes() > device.free_bytes) {
    LOG(WARNING) << "memory_plan_exceeds_device bytes=" << memory_.total_bytes()
                 << " free_bytes=" << device.free_bytes
                 << " note=\"training may lack memory; fewer --kv_blocks leave more\"";
  }
  if (config_.deterministic) {
    RETURN_IF_ERROR(CheckRowEquality(*decoder_, model_.params, config_.block_tokens));
    LOG(INFO) << "row_equality ok note=\"a row's bits depend on its own prefix alone\"";
  }
  EngineOptions options = MakeEngineOptions();
  options.on_device_error = [this](const absl::Status&) { readiness_.SetFailed(); };
  ASSIGN_OR_RETURN(engine_, Engine::Create(options, model_, *decoder_, metrics_, clock_));
  return absl::OkStatus();
}

EngineOptions Daemon::MakeEngineOptions() const {
  EngineOptions options;
  options.block_tokens = config_.block_tokens;
  options.num_blocks = memory_.num_blocks;
  options.max_batch_rows = config_.max_batch_rows;
  options.max_running_samples = config_.max_running_samples;
  options.overlap = config_.OverlapsSteps();
  options.max_queued_requests = config_.max_queued_requests;
  options.max_group_size = std::min(config_.max_group_size, config_.max_running_samples);
  options.max_context = memory_.max_context;
  options.max_rollouts = config_.max_rollouts;
  options.prompt_state_bytes = config_.prompt_state_bytes;
  options.max_step_records = config_.max_step_records;
  options.seed = config_.seed;
  options.max_reader_stall = absl::Seconds(config_.max_reader_stall_s);
  options.trainer.max_rows = config_.max_train_rows;
  options.trainer.activation_bytes = memory_.activation_bytes;
  options.trainer.gradient_dtype = config_.GradientDType();
  options.trainer.step_log_dir = step_log_dir_;
  options.trainer.slow_context = config_.deterministic && config_.device == "cuda";
  return options;
}

absl::Status Daemon::StartRpc() {
  RpcContext context{.engine = *engine_,
                     .model = model_,
                     .clock = clock_,
                     .readiness = readiness_,
                     .engine_options = MakeEngineOptions(),
                     .max_message_bytes = config_.max_message_bytes,
                     .stream_capacity = config_.stream_events,
                     .trust_tenant_header = config_.trust_tenant_header,
                     .checkpoint_dir = config_.checkpoint_dir,
                     .version = COPPICE_VERSION,
                     .started_at = clock_.Now(),
                     .memory_plan = memory_.regions};
  const RpcServer::Options options{.host = config_.host, .port = static_cast<int>(config_.port)};
  ASSIGN_OR_RETURN(rpc_, RpcServer::Start(options, std::move(context)));
  readiness_.SetListener([this](bool ready) { rpc_->SetServing(ready); });
  return absl::OkStatus();
}

absl::Status Daemon::AnnounceReady() {
  readiness_.SetLoaded();
  RETURN_IF_ERROR(WritePortFile(config_.port_file, rpc_->port(), http_->port()));
  LOG(INFO) << "ready grpc=" << config_.host << ':' << rpc_->port() << " http=" << config_.host
            << ':' << http_->port() << " policy_version=" << Raw(engine_->policy_version());
  return absl::OkStatus();
}

ExitCode Daemon::Serve() {
  while (LifeEvents::num_signals() == 0 && !engine_ended_) {
    events_->Wait(absl::InfiniteDuration());
  }
  if (!engine_ended_) return Drain();
  StopEngine();
  return Fail(ExitCode::kDeviceError, "engine_failed", engine_status_);
}

ExitCode Daemon::Drain() {
  LOG(INFO) << "drain_started timeout_s=" << config_.drain_timeout_s
            << " note=\"a second signal stops at once\"";
  readiness_.SetDraining();
  drainer_ = std::make_unique<Drainer>(*engine_, [this] { events_->Post(); });
  const absl::Duration deadline = clock_.Now() + absl::Seconds(config_.drain_timeout_s);
  while (!drainer_->drained() && !engine_ended_ && LifeEvents::num_signals() < 2 &&
         clock_.Now() < deadline) {
    drainer_->Ask();
    events_->Wait(std::min(kAskAgain, deadline - clock_.Now()));
  }
  const bool drained = drainer_->drained();
  StopEngine();
  if (!engine_status_.ok()) return Fail(ExitCode::kDeviceError, "engine_failed", engine_status_);
  if (drained) {
    LOG(INFO) << "stopped drained=yes";
    return ExitCode::kDrained;
  }
  LOG(WARNING)
      << "stopped drained=no exit_code=" << static_cast<int>(ExitCode::kNotDrained)
      << " open requests ended with UNAVAILABLE; raise --drain_timeout_s to let them finish";
  return ExitCode::kNotDrained;
}

void Daemon::StopEngine() {
  engine_->Stop();
  const absl::Duration deadline = clock_.Now() + kStopGrace;
  while (!engine_ended_ && clock_.Now() < deadline) events_->Wait(deadline - clock_.Now());
  if (!engine_ended_) {
    LOG(WARNING) << "stopped drained=no the engine's step did not end within "
                 << absl::FormatDuration(kStopGrace)
                 << "; durable steps are safe, other work is lost";
    std::_Exit(static_cast<int>(ExitCode::kNotDrained));
  }
  engine_thread_.join();
  readiness_.SetListener(nullptr);
  if (rpc_ != nullptr) rpc_->Shutdown(kFlushGrace);
  http_.reset();
}

}  // namespace coppice
