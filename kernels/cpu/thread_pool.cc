#include "kernels/cpu/thread_pool.h"

#include "kernels/base/check.h"

namespace coppice::cpu {

ThreadPool::ThreadPool(int num_threads) {
  CHECK_GE(num_threads, 1);
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { WorkerLoop(i); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  {
    absl::MutexLock lock(&mutex_);
    wake_.SignalAll();
  }
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::Run(int64_t num_items, Body body) {
  if (workers_.empty() || num_items <= 1) {
    for (int64_t i = 0; i < num_items; ++i) body(i, 0);
    return;
  }
  const uint64_t items = static_cast<uint64_t>(num_items);
  CHECK_LT(items, kClosed);
  const uint64_t loop = (ticket_.load() >> 32) + 1;
  body_.store(&body);
  num_items_.store(items);
  num_done_.store(0);
  ticket_.store(loop << 32);
  if (num_sleeping_.load() > 0) {
    absl::MutexLock lock(&mutex_);
    wake_.SignalAll();
  }
  Work(0);
  while (num_done_.load() < items) std::this_thread::yield();
  ticket_.store(loop << 32 | kClosed);
}

bool ThreadPool::Work(int thread) {
  bool worked = false;
  uint64_t ticket = ticket_.load();
  while ((ticket & kClosed) != kClosed) {
    const Body* body = body_.load();
    const uint64_t item = ticket & kClosed;
    if (item >= num_items_.load()) break;
    // Succeeds only if the loop is still the one whose body and size were read.
    if (!ticket_.compare_exchange_weak(ticket, ticket + 1)) continue;
    (*body)(static_cast<int64_t>(item), thread);
    num_done_.fetch_add(1);
    worked = true;
    ticket = ticket_.load();
  }
  return worked;
}

void ThreadPool::WorkerLoop(int thread) {
  constexpr int kIdleYields = 200;  // some 50 us, the gap between two ops of one step
  int idle = 0;
  while (!stopping_.load()) {
    if (Work(thread)) {
      idle = 0;
    } else if (++idle < kIdleYields) {
      std::this_thread::yield();
    } else {
      Sleep();
      idle = 0;
    }
  }
}

void ThreadPool::Sleep() {
  absl::MutexLock lock(&mutex_);
  num_sleeping_.fetch_add(1);
  while (closed() && !stopping_.load()) wake_.Wait(&mutex_);
  num_sleeping_.fetch_sub(1);
}

}  // namespace coppice::cpu
