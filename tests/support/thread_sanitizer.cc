// Linked into every test under the thread sanitizer: what it cannot see in libraries that are built
// without it.
//
// Abseil's locks: these functions come before the library's, in calls of libraries, too; they call
// them, and tell the sanitizer. A condition is evaluated by the thread that waits or by one that
// unlocks, in either case behind what was told: reads there are not asked.
//
// What these libraries order by atomics of their own, between their threads and with callbacks: not
// told, hence suppressed, with all that has a frame of them in its stack. So a race with a callback
// of ours is not found. The names below are those of Debian's Abseil 20220623.
#include <dlfcn.h>

#include <string>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"

extern "C" {
void __tsan_acquire(void* lock);
void __tsan_release(void* lock);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);

const char* __tsan_default_suppressions() {
  return "race:libgrpc\nrace:grpc::\nrace:libabsl_\nrace:libprotobuf.so\nrace:libupb.so\n";
}
}

namespace {

// The library's own, by its mangled name inside of Abseil's namespace.
template <typename Function>
Function* Next(const std::string& name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, ("_ZN4absl7debian3" + name).c_str()));
}

// While the library gives a lock, and perhaps waits before it takes it again.
class Giving {
 public:
  explicit Giving(void* lock) {
    __tsan_release(lock);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  }
  ~Giving() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
  Giving(const Giving&) = delete;
};

template <typename Wait>
auto GiveAndTake(void* lock, const Wait& wait) {
  struct Taken {
    void* lock;
    ~Taken() { __tsan_acquire(lock); }
  } taken = {lock};
  const Giving giving(lock);
  return wait();
}

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() {
  static const auto next = Next<void(Mutex*)>("5Mutex4LockEv");
  next(this);
  __tsan_acquire(this);
}
void Mutex::ReaderLock() {
  static const auto next = Next<void(Mutex*)>("5Mutex10ReaderLockEv");
  next(this);
  __tsan_acquire(this);
}
bool Mutex::TryLock() {
  static const auto next = Next<bool(Mutex*)>("5Mutex7TryLockEv");
  const bool locked = next(this);
  if (locked) __tsan_acquire(this);
  return locked;
}
void Mutex::Unlock() {
  static const auto next = Next<void(Mutex*)>("5Mutex6UnlockEv");
  const Giving giving(this);
  next(this);
}
void Mutex::ReaderUnlock() {
  static const auto next = Next<void(Mutex*)>("5Mutex12ReaderUnlockEv");
  const Giving giving(this);
  next(this);
}
void Mutex::Await(const Condition& condition) {
  static const auto next = Next<void(Mutex*, const Condition&)>("5Mutex5AwaitERKNS0_9ConditionE");
  GiveAndTake(this, [&] { next(this, condition); });
}
bool Mutex::AwaitWithTimeout(const Condition& condition, Duration timeout) {
  static const auto next = Next<bool(Mutex*, const Condition&, Duration)>(
      "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  return GiveAndTake(this, [&] { return next(this, condition, timeout); });
}

void CondVar::Wait(Mutex* mutex) {
  static const auto next = Next<void(CondVar*, Mutex*)>("7CondVar4WaitEPNS0_5MutexE");
  GiveAndTake(mutex, [&] { next(this, mutex); });
}
bool CondVar::WaitWithTimeout(Mutex* mutex, Duration timeout) {
  static const auto next = Next<bool(CondVar*, Mutex*, Duration)>(
      "7CondVar15WaitWithTimeoutEPNS0_5MutexENS0_8DurationE");
  return GiveAndTake(mutex, [&] { return next(this, mutex, timeout); });
}
bool CondVar::WaitWithDeadline(Mutex* mutex, Time deadline) {
  static const auto next =
      Next<bool(CondVar*, Mutex*, Time)>("7CondVar16WaitWithDeadlineEPNS0_5MutexENS0_4TimeE");
  return GiveAndTake(mutex, [&] { return next(this, mutex, deadline); });
}

bool BlockingCounter::DecrementCount() {
  static const auto next = Next<bool(BlockingCounter*)>("15BlockingCounter14DecrementCountEv");
  __tsan_release(this);
  return next(this);
}
void BlockingCounter::Wait() {
  static const auto next = Next<void(BlockingCounter*)>("15BlockingCounter4WaitEv");
  next(this);
  __tsan_acquire(this);
}

ABSL_NAMESPACE_END
}  // namespace absl
