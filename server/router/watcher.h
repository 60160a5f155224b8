// Watcher: keeps the fleet's view of the replicas true. Each round its thread asks every replica
// for its health and its facts, all at once, within --health_timeout_ms. A suspicion raised by a
// broken call starts a round at once. A second thread resolves the service again, every
// --replica_dns_interval_s: a slow resolver delays no round.
//
// Owner: the router; Stop before the fleet goes.
#pragma once

#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/router/fleet.h"

namespace coppice {

class Watcher {
 public:
  struct Options {
    std::string replicas;     // a list, or
    std::string replica_dns;  // the name of a service
    absl::Duration dns_interval = absl::Seconds(5);
    absl::Duration health_interval = absl::Seconds(1);
    absl::Duration health_timeout = absl::Seconds(1);
  };

  // `changed` is called after every round.
  Watcher(const Options& options, Fleet& fleet, RouterMetrics& metrics, const Clock& clock,
          std::function<void()> changed)
      : options_(options),
        fleet_(fleet),
        metrics_(metrics),
        clock_(clock),
        changed_(std::move(changed)) {}
  ~Watcher() { Stop(); }

  // Finds the replicas, asks each once, starts the threads. Replicas that do not answer yet and a
  // service without addresses are no error: a pod's name may exist only after this one started.
  // INVALID_ARGUMENT (bad list, address or leader), FAILED_PRECONDITION (different models).
  absl::Status Start();
  void Stop();
  // A round at once. Any thread, never blocks.
  void Poke();

 private:
  absl::Status Resolve();
  void Round();
  void Run();
  void RunResolver();  // only with a service

  const Options options_;
  Fleet& fleet_;
  RouterMetrics& metrics_;
  const Clock& clock_;
  const std::function<void()> changed_;
  bool resolves_ = true;  // Start's, then the resolver's
  std::thread thread_, resolver_;

  absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  bool poked_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace coppice
