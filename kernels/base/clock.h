// Injected time. Monotonic: the origin is arbitrary and never goes back; never compare with
// wall-clock time.
#pragma once

#include <chrono>

#include "absl/time/time.h"

namespace coppice {

class Clock {
 public:
  virtual ~Clock() = default;
  // Time since an arbitrary fixed origin; never decreases. Any thread.
  virtual absl::Duration Now() const = 0;
};

class SteadyClock final : public Clock {
 public:
  absl::Duration Now() const override {
    return absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch());
  }
};

}  // namespace coppice
