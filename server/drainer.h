// Drainer: asks the engine to drain until it accepts. A refusal (its command queue is full, say)
// means that requests are still open, and is never taken for the end.
//
// Thread: main; the engine answers on its own.
#pragma once

#include <atomic>
#include <functional>
#include <utility>

#include "server/engine/engine.h"

namespace coppice {

class Drainer {
 public:
  // `drained` is called once nothing runs or waits, on the engine thread. The engine answers every
  // question before it is gone, so this must outlive its Run().
  Drainer(Engine& engine, std::function<void()> drained)
      : engine_(engine), on_drained_(std::move(drained)) {}
  Drainer(const Drainer&) = delete;
  Drainer& operator=(const Drainer&) = delete;

  // Asks unless a question is open or answered. Call again until drained().
  void Ask() {
    State idle = State::kIdle;
    if (!state_.compare_exchange_strong(idle, State::kAsked)) return;
    engine_.Drain([this](const absl::StatusOr<int64_t>& answer) {
      state_ = answer.ok() ? State::kDrained : State::kIdle;
      if (answer.ok()) on_drained_();
    });
  }
  bool drained() const { return state_ == State::kDrained; }

 private:
  enum class State { kIdle, kAsked, kDrained };

  Engine& engine_;
  const std::function<void()> on_drained_;
  std::atomic<State> state_{State::kIdle};
};

}  // namespace coppice
