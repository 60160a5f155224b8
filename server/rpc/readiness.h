// Readiness: whether the daemon wants traffic, for /readyz and the health service, and whether it
// is still whole, for /healthz. Any thread.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace coppice {

class Readiness {
 public:
  // Empty = ready; else the strongest reason against: "failed", "draining", "loading", "paused".
  std::string NotReadyReason() const {
    absl::MutexLock lock(&mutex_);
    return Reason();
  }
  void SetLoaded() { Set(&Readiness::loading_, false); }
  void SetPaused(bool paused) { Set(&Readiness::paused_, paused); }
  void SetDraining() { Set(&Readiness::draining_, true); }  // there is no way back
  void SetFailed() { Set(&Readiness::failed_, true); }      // nor here
  bool failed() const {
    absl::MutexLock lock(&mutex_);
    return failed_;
  }
  // Called with `ready` now and after every change, one call at a time.
  void SetListener(std::function<void(bool ready)> listener) {
    absl::MutexLock lock(&mutex_);
    listener_ = std::move(listener);
    if (listener_) listener_(Reason().empty());
  }

 private:
  std::string Reason() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (failed_) return "failed";
    if (draining_) return "draining";
    if (loading_) return "loading";
    return paused_ ? "paused" : "";
  }
  void Set(bool Readiness::*flag, bool value) {
    absl::MutexLock lock(&mutex_);
    this->*flag = value;
    if (listener_) listener_(Reason().empty());
  }

  mutable absl::Mutex mutex_;
  bool loading_ ABSL_GUARDED_BY(mutex_) = true;
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  bool failed_ ABSL_GUARDED_BY(mutex_) = false;
  std::function<void(bool)> listener_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace coppice
