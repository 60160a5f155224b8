// Roster: every accepted request - waiting or running - and the stems in flight, with the views of
// them that the scheduler plans on. Moves nothing on the device. Owner and thread: Generator, on
// the engine thread.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "server/engine/group.h"
#include "server/engine/kv_store.h"
#include "server/engine/scheduler.h"

namespace coppice {

class Roster {
 public:
  using Groups = std::map<RequestId, std::unique_ptr<Group>>;

  // ---- Requests
  void AddWaiting(std::unique_ptr<Group> group, const KvStore& kv, absl::Duration now);
  // Waiting -> running and back. REQUIRES: the request is there.
  Group& Admit(RequestId id);
  void Unadmit(RequestId id);
  void Remove(RequestId id);
  Group* FindRunning(RequestId id);
  const Groups& waiting() const { return waiting_; }
  const Groups& running() const { return running_; }
  // Waiting and running requests that `want` picks, oldest first.
  std::vector<Group*> Select(const std::function<bool(const Group&)>& want) const;
  int64_t num_running_samples() const;

  // ---- Stems in flight, in order of creation
  const std::vector<std::shared_ptr<Stem>>& stems() const { return stems_; }
  void AddStem(std::shared_ptr<Stem> stem) { stems_.push_back(std::move(stem)); }
  void RemoveStem(const Stem* stem);
  std::shared_ptr<Stem> FindStem(uint64_t id) const;
  // The stem that `sample` waits for. REQUIRES: it is sprouting.
  std::shared_ptr<Stem> StemOf(const Group& group, int32_t sample) const;
  // A stem in flight from whose end this path may sprout too, or null.
  std::shared_ptr<Stem> FindJoinable(const Group& group, const std::vector<int32_t>& path,
                                     const Namespace& ns) const;
  // The group's samples no longer wait for any stem; stems without sprouts go.
  void Detach(const Group& group);

  // ---- Views
  AdmissionInput AdmissionView(const KvStore& kv, int64_t max_samples, absl::Duration now);
  // What can run now: samples that have or get the block for their next token, stems whose next row
  // may be computed.
  RowInput PrepareRows(KvStore& kv, int64_t max_rows);

 private:
  // Looks a few waiting prompts up in the cache again, the next ones each time.
  void RefreshEstimates(const KvStore& kv, absl::Duration now);
  WaitingView ViewWaiting(const Group& group, const KvStore& kv, absl::Duration now) const;
  void ViewRunning(const Group& group, const KvStore& kv, absl::Duration now,
                   AdmissionInput& input) const;
  void ViewStems(const KvStore& kv, AdmissionInput& input) const;

  Groups waiting_;
  Groups running_;
  std::vector<std::shared_ptr<Stem>> stems_;
  RequestId last_refreshed_{0};
};

// The reader keeps up: there is room for another token.
bool HasReader(const Group& group);
bool CanDecode(const Group& group, int32_t sample);

}  // namespace coppice
