// Daemon: builds and owns all parts of coppiced in order, and takes them down in reverse.
//
//   HTTP (not ready) -> Ops -> Model -> Decoder -> memory plan -> Engine and its thread -> RPC ->
//   ready SIGTERM -> not ready, health NOT_SERVING -> drain (bounded) -> Engine stops -> RPC ->
//   HTTP
//
// Thread: main. The engine thread is started here and does nothing but Engine::Run.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "kernels/base/clock.h"
#include "kernels/model/decoder.h"
#include "kernels/model/model_loader.h"
#include "kernels/ops/ops.h"
#include "server/config.h"
#include "server/drainer.h"
#include "server/engine/engine.h"
#include "server/exit_code.h"
#include "server/http/http_server.h"
#include "server/life_events.h"
#include "server/memory_plan.h"
#include "server/metrics/metrics.h"
#include "server/rpc/readiness.h"
#include "server/rpc/rpc_server.h"

namespace coppice {

class Daemon {
 public:
  // `make_ops` opens the device that the flags name, to compute in the given type.
  using MakeOps = std::function<absl::StatusOr<std::unique_ptr<ops::Ops>>(const Config&, DType)>;
  Daemon(Config config, MakeOps make_ops)
      : config_(std::move(config)), make_ops_(std::move(make_ops)) {}
  ~Daemon();
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  // Everything: start, serve until a signal or a device error, drain, stop. Call once.
  ExitCode Run();

 private:
  absl::Status MakeStepLogDir();
  absl::Status StartHttp();
  absl::Status OpenDevice(const ComputeType& compute);
  absl::Status Load(const ComputeType& compute);  // Model, Decoder, memory plan, Engine
  absl::Status StartRpc();
  absl::Status AnnounceReady();
  // Blocks until everything is over.
  ExitCode Serve();
  ExitCode Drain();
  // Ends the engine thread, open requests answered with UNAVAILABLE. A step that takes longer than
  // the grace ends the process.
  void StopEngine();
  EngineOptions MakeEngineOptions() const;

  const Config config_;
  const MakeOps make_ops_;
  std::string step_log_dir_;  // of durable steps; empty without a checkpoint directory
  SteadyClock clock_;
  Metrics metrics_;
  Readiness readiness_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<ops::Ops> ops_;
  Model model_;
  std::unique_ptr<Decoder> decoder_;
  MemoryPlan memory_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<RpcServer> rpc_;
  std::unique_ptr<LifeEvents> events_;
  std::unique_ptr<Drainer> drainer_;  // from the first signal on
  std::thread engine_thread_;
  absl::Status engine_status_;  // written before engine_ended_
  std::atomic<bool> engine_ended_{false};
};

}  // namespace coppice
