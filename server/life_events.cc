#include "server/life_events.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>

#include "kernels/base/check.h"

namespace coppice {
namespace {

// A signal handler can reach globals only.
std::atomic<int> signals{0};
std::atomic<int> event_fd{-1};
static_assert(std::atomic<int>::is_always_lock_free);

void Notify() {
  const uint64_t one = 1;
  // Fails only if the counter is full, and then a Wait ends anyway.
  [[maybe_unused]] const ssize_t written = write(event_fd, &one, sizeof(one));
}

void OnSignal(int) {
  const int saved_errno = errno;
  signals.fetch_add(1);
  Notify();
  errno = saved_errno;
}

}  // namespace

LifeEvents::LifeEvents() {
  event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  CHECK_GE(event_fd.load(), 0);
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  CHECK_EQ(sigaction(SIGTERM, &action, nullptr), 0);
  CHECK_EQ(sigaction(SIGINT, &action, nullptr), 0);
}

void LifeEvents::Post() { Notify(); }

void LifeEvents::Wait(absl::Duration timeout) {
  struct pollfd ready = {event_fd, POLLIN, 0};
  const int64_t ms = absl::ToInt64Milliseconds(absl::Ceil(timeout, absl::Milliseconds(1)));
  poll(&ready, 1,
       timeout == absl::InfiniteDuration()
           ? -1
           : static_cast<int>(std::clamp<int64_t>(ms, 0, INT32_MAX)));
  uint64_t count = 0;
  [[maybe_unused]] const ssize_t got = read(event_fd, &count, sizeof(count));
}

int LifeEvents::num_signals() { return signals.load(); }

}  // namespace coppice
