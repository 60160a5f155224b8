// BoundedQueue: how other threads hand things to the engine thread. Many producers that never wait,
// one consumer. Order is first in, first out. Closing is final: what is pushed later is refused,
// what is inside can still be taken.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace coppice {

template <typename T>
class BoundedQueue {
 public:
  enum class PushResult { kPushed, kFull, kClosed };

  explicit BoundedQueue(int64_t capacity) : capacity_(capacity) {}

  // Any thread; never waits. The item is moved from only if pushed.
  PushResult TryPush(T&& item) {
    absl::MutexLock lock(&mutex_);
    if (closed_) return PushResult::kClosed;
    if (static_cast<int64_t>(items_.size()) >= capacity_) return PushResult::kFull;
    items_.push_back(std::move(item));
    return PushResult::kPushed;
  }

  // Everything inside, oldest first.
  std::vector<T> TakeAll() {
    absl::MutexLock lock(&mutex_);
    return std::exchange(items_, {});
  }

  void Close() {
    absl::MutexLock lock(&mutex_);
    closed_ = true;
  }

 private:
  const int64_t capacity_;
  absl::Mutex mutex_;
  std::vector<T> items_ ABSL_GUARDED_BY(mutex_);
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
};

// One of a bounded number of places, given back when dropped. Move-only. Any thread.
class QueueSlot {
 public:
  QueueSlot() = default;
  // Empty (false) if `taken` has reached `limit`.
  static QueueSlot TryTake(std::atomic<int64_t>& taken, int64_t limit) {
    QueueSlot slot;
    if (taken.fetch_add(1) < limit) {
      slot.taken_ = &taken;
    } else {
      taken.fetch_sub(1);
    }
    return slot;
  }
  QueueSlot(QueueSlot&& other) noexcept : taken_(std::exchange(other.taken_, nullptr)) {}
  QueueSlot& operator=(QueueSlot&& other) noexcept {
    std::swap(taken_, other.taken_);
    return *this;
  }
  ~QueueSlot() { Release(); }

  void Release() {
    if (taken_ != nullptr) taken_->fetch_sub(1);
    taken_ = nullptr;
  }
  explicit operator bool() const { return taken_ != nullptr; }

 private:
  std::atomic<int64_t>* taken_ = nullptr;
};

// A bell with a memory: a ring before the wait ends the next wait at once. Any thread rings, one
// waits.
class Doorbell {
 public:
  void Ring() {
    absl::MutexLock lock(&mutex_);
    rung_ = true;
  }

  // Returns after a ring or after `timeout`.
  void Wait(absl::Duration timeout) {
    absl::MutexLock lock(&mutex_);
    mutex_.AwaitWithTimeout(absl::Condition(&rung_), timeout);
    rung_ = false;
  }

 private:
  absl::Mutex mutex_;
  bool rung_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace coppice
