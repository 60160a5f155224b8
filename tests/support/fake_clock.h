// FakeClock: time that moves only when a test says so. Any thread.
#pragma once

#include <atomic>

#include "absl/time/time.h"
#include "kernels/base/clock.h"

namespace coppice {

class FakeClock final : public Clock {
 public:
  absl::Duration Now() const override { return absl::Nanoseconds(nanoseconds_.load()); }
  void Advance(absl::Duration d) { nanoseconds_ += absl::ToInt64Nanoseconds(d); }

 private:
  std::atomic<int64_t> nanoseconds_{1'000'000'000};
};

}  // namespace coppice
