// StepLog: the durable steps on disk. Entry n is a checkpoint directory `step-<n>` and the step
// records that go with it, `step-<n>.json`, written before. The checkpoint appears whole or not at
// all, so an entry counts iff its directory is there, and the answers in its records are of exactly
// the history that its weights have - whatever their versions, which go back when another
// checkpoint is loaded. Older entries are removed once a newer one is complete. Owner and thread:
// PolicyGate, on the engine thread. Errors: UNAVAILABLE with path and reason; a directory that
// cannot be listed is never taken for an empty one.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace coppice {

class StepLog {
 public:
  struct Entry {
    int64_t number = 0;
    std::string checkpoint;
    std::string records;
  };

  // `directory`: empty = no log. Reads nothing until asked.
  explicit StepLog(std::string directory) : directory_(std::move(directory)) {}

  bool present() const { return !directory_.empty(); }
  // The newest complete entry, if any.
  absl::StatusOr<std::optional<Entry>> Newest() const;
  // Where the next entry goes. Left-overs of an attempt that failed there are overwritten.
  absl::StatusOr<Entry> Next() const;
  // Removes every entry but this one, and records without checkpoint.
  void RemoveOthers(const Entry& entry) const;

 private:
  Entry At(int64_t number) const;

  const std::string directory_;
};

// Writes a file through a temporary one beside it: synced, then renamed.
absl::Status WriteSynced(const std::string& path, const std::string& text);

}  // namespace coppice
