// PhaseTimer: seconds by phase of one call. Lap(name) adds the time since the last lap to `name`;
// phases keep the order of their first lap.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/base/clock.h"

namespace coppice {

class PhaseTimer {
 public:
  explicit PhaseTimer(const Clock& clock) : clock_(clock), last_(clock.Now()) {}

  void Lap(absl::string_view phase) {
    const absl::Duration now = clock_.Now();
    const double seconds = absl::ToDoubleSeconds(now - last_);
    last_ = now;
    for (auto& [name, total] : phases_) {
      if (name == phase) {
        total += seconds;
        return;
      }
    }
    phases_.emplace_back(std::string(phase), seconds);
  }
  std::vector<std::pair<std::string, double>> Take() { return std::move(phases_); }

 private:
  const Clock& clock_;
  absl::Duration last_;
  std::vector<std::pair<std::string, double>> phases_;
};

}  // namespace coppice
