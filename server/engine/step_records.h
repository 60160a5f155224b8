// StepRecords: the answers given to step ids, so that a step is applied once however often it is
// asked for. Kept per kind of call, at most `capacity` finished ones; the oldest goes first. Owner
// and thread: PolicyGate, on the engine thread.
//
// The newest can be written to a file that goes with a durable checkpoint: step_log.h.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "server/engine/engine.h"

namespace coppice {

enum class StepKind { kTrainStep, kForwardBackward, kOptimStep };

class StepRecords {
 public:
  using Key = std::pair<StepKind, std::string>;

  struct Record {
    bool done = false;
    bool durable = false;
    TrainStepResult result;
    std::vector<Reply<TrainStepResult>> waiting;  // the first one asked first
  };

  explicit StepRecords(int64_t capacity) : capacity_(capacity) {}

  Record* Find(const Key& key);
  void Begin(const Key& key, Reply<TrainStepResult> reply);
  // Keeps the result; those who wait for the answer are handed over.
  std::vector<Reply<TrainStepResult>> Keep(const Key& key, const TrainStepResult& result);
  // Answers all who wait with `status`; forgets the step.
  void Fail(const Key& key, const absl::Status& status);
  // A finished step that has no effect any more.
  void Forget(const Key& key);
  void Clear();  // finished ones

  // The newest kMaxPersistedSteps finished steps, without ForwardBackward: gradients are in no
  // checkpoint.
  absl::Status WriteFile(const std::string& path) const;
  // Replaces all. A missing file is an empty one. DATA_LOSS if it cannot be read.
  absl::Status ReadFile(const std::string& path);

 private:
  const int64_t capacity_;
  std::map<Key, Record> records_;
  std::deque<Key> done_;  // oldest first
};

inline constexpr int64_t kMaxPersistedSteps = 16;

}  // namespace coppice
