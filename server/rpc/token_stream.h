// TokenStream: the bounded hand-off of one Generate call's events from the engine thread to its
// connection.
//
// Threads: the GenerateSink side is called by the engine thread, the other side by gRPC's threads;
// one short lock between them. Flow: at most one write is in flight, the rest waits here. From
// `capacity` waiting events on HasRoom() is false and the engine pauses this request only; when the
// queue is half empty again the engine is woken. One engine step may add an event or two per sample
// beyond the capacity. Memory is thus bounded by capacity + 2 n + 2 events. End: Finish reaches the
// transport exactly once, after the engine's OnDone and after every event before it was written; a
// caller that is gone (Cancel, or a failed write) makes the engine give up, and its OnDone then
// ends the call.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "coppice/v1/generation.pb.h"
#include "server/engine/request.h"

namespace coppice {

class TokenStream final : public GenerateSink {
 public:
  // The connection. Neither call blocks nor calls back into the stream on the same stack.
  class Transport {
   public:
    virtual ~Transport() = default;
    // `event` stays valid until the transport reports WriteDone().
    virtual void Write(const v1::GenerateEvent* event) = 0;
    virtual void Finish(const absl::Status& status) = 0;
  };

  struct Options {
    int64_t capacity = 256;             // events
    std::vector<int32_t> prompt_echo;   // token ids of a text prompt, returned in Started
    std::function<void()> wake_engine;  // room again, or cancelled; any thread
  };
  // `transport` outlives the Finish call.
  TokenStream(Options options, Transport& transport)
      : options_(std::move(options)), transport_(transport) {}

  // ---- gRPC's threads
  void WriteDone(bool ok);
  void Cancel();
  // The engine refused the request: nothing else will come from it.
  void Refuse(const absl::Status& status);

  // ---- Engine thread
  bool HasRoom() const override;
  bool Cancelled() const override { return cancelled_.load(std::memory_order_relaxed); }
  void OnStarted(uint64_t seed, const Usage& prompt_usage, PolicyVersion version) override;
  void OnChunk(TokenChunk chunk) override;
  void OnSampleFinished(const SampleFinished& finished) override;
  void OnDone(const absl::Status& status, const Usage& usage, const std::string& rollout_id,
              PolicyVersion version) override;

 private:
  // What to do after the lock is released: a reaction of the transport may need the lock.
  enum class Next { kNothing, kWrite, kFinish };
  Next Advance() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Do(Next next);
  void Push(v1::GenerateEvent event);

  Options options_;
  Transport& transport_;
  std::atomic<bool> cancelled_{false};

  mutable absl::Mutex mutex_;
  std::deque<v1::GenerateEvent> waiting_ ABSL_GUARDED_BY(mutex_);
  v1::GenerateEvent writing_;  // belongs to the transport while write_in_flight_
  bool write_in_flight_ ABSL_GUARDED_BY(mutex_) = false;
  mutable bool asked_for_room_ ABSL_GUARDED_BY(mutex_) = false;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_;  // set before done_, read after it
};

}  // namespace coppice
