// LifeEvents: what the main thread waits for once the daemon is ready: SIGTERM or SIGINT, or a
// Post() from another thread.
#pragma once

#include "absl/time/time.h"

namespace coppice {

class LifeEvents {
 public:
  // Takes over SIGTERM and SIGINT for the rest of the process; until then they end it, and nothing
  // was promised. Call once.
  LifeEvents();
  LifeEvents(const LifeEvents&) = delete;
  LifeEvents& operator=(const LifeEvents&) = delete;

  // Ends a Wait, now or the next one. Any thread.
  void Post();
  // Returns after a signal or Post that no Wait has seen yet, or after `timeout`. Main thread.
  void Wait(absl::Duration timeout);
  // Signals so far.
  static int num_signals();
};

}  // namespace coppice
