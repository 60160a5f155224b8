#include "server/engine/roster.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"

namespace coppice {
namespace {

constexpr int kRefreshedPerStep = 8;

}  // namespace

bool HasReader(const Group& group) { return group.is_warm() || group.sink->HasRoom(); }

bool CanDecode(const Group& group, int32_t index) {
  const Sample& sample = group.samples[index];
  if (sample.state != Sample::State::kDecoding || !HasReader(group)) return false;
  const int64_t drawn = static_cast<int64_t>(sample.tokens.size());
  return drawn + (group.HasTokenInFlight(index) ? 1 : 0) < group.max_response;
}

void Roster::AddWaiting(std::unique_ptr<Group> group, const KvStore& kv, absl::Duration now) {
  group->estimate = kv.Peek(*group, now);
  const RequestId id = group->id;
  waiting_.emplace(id, std::move(group));
}

Group& Roster::Admit(RequestId id) {
  auto node = waiting_.extract(id);
  CHECK(!node.empty());
  return *running_.insert(std::move(node)).position->second;
}

void Roster::Unadmit(RequestId id) { waiting_.insert(running_.extract(id)); }

void Roster::Remove(RequestId id) {
  waiting_.erase(id);
  running_.erase(id);
}

Group* Roster::FindRunning(RequestId id) {
  const auto it = running_.find(id);
  return it == running_.end() ? nullptr : it->second.get();
}

std::vector<Group*> Roster::Select(const std::function<bool(const Group&)>& want) const {
  std::vector<Group*> selected;
  for (const Groups* groups : {&running_, &waiting_}) {
    for (const auto& [id, group] : *groups) {
      if (want(*group)) selected.push_back(group.get());
    }
  }
  return selected;
}

int64_t Roster::num_running_samples() const {
  int64_t n = 0;
  for (const auto& [id, group] : running_) n += group->unfinished();
  return n;
}

void Roster::RemoveStem(const Stem* stem) {
  std::erase_if(stems_, [stem](const std::shared_ptr<Stem>& s) { return s.get() == stem; });
}

std::shared_ptr<Stem> Roster::FindStem(uint64_t id) const {
  for (const std::shared_ptr<Stem>& stem : stems_) {
    if (stem->id == id) return stem;
  }
  return nullptr;
}

std::shared_ptr<Stem> Roster::StemOf(const Group& group, int32_t sample) const {
  for (const std::shared_ptr<Stem>& stem : stems_) {
    for (const Sprout& sprout : stem->sprouts) {
      if (sprout.group == &group && sprout.sample == sample) return stem;
    }
  }
  return nullptr;
}

std::shared_ptr<Stem> Roster::FindJoinable(const Group& group, const std::vector<int32_t>& path,
                                           const Namespace& ns) const {
  if (group.request.cache_skip_read || group.request.cache_skip_write) return nullptr;
  for (const std::shared_ptr<Stem>& stem : stems_) {
    if (stem->joinable && stem->wants_logits != group.is_warm() && stem->ns == ns &&
        stem->tokens == path) {
      return stem;
    }
  }
  return nullptr;
}

void Roster::Detach(const Group& group) {
  for (const std::shared_ptr<Stem>& stem : stems_) {
    std::erase_if(stem->sprouts, [&](const Sprout& s) { return s.group == &group; });
  }
  std::erase_if(stems_, [](const std::shared_ptr<Stem>& s) { return s->sprouts.empty(); });
}

AdmissionInput Roster::AdmissionView(const KvStore& kv, int64_t max_samples, absl::Duration now) {
  AdmissionInput input;
  RefreshEstimates(kv, now);
  for (const auto& [id, group] : waiting_) input.waiting.push_back(ViewWaiting(*group, kv, now));
  for (const auto& [id, group] : running_) ViewRunning(*group, kv, now, input);
  ViewStems(kv, input);
  input.available_blocks = kv.cache().AvailableBlocks();
  input.free_samples = max_samples - num_running_samples();
  return input;
}

void Roster::RefreshEstimates(const KvStore& kv, absl::Duration now) {
  for (int i = 0; i < kRefreshedPerStep && i < static_cast<int>(waiting_.size()); ++i) {
    auto it = waiting_.upper_bound(last_refreshed_);
    if (it == waiting_.end()) it = waiting_.begin();
    it->second->estimate = kv.Peek(*it->second, now);
    last_refreshed_ = it->first;
  }
}

WaitingView Roster::ViewWaiting(const Group& group, const KvStore& kv, absl::Duration now) const {
  const int64_t prompt = static_cast<int64_t>(group.request.prompt.size());
  const int64_t samples = static_cast<int64_t>(group.samples.size());
  WaitingView view{.id = group.id,
                   .tenant = group.request.tenant_salt,
                   .priority = group.request.priority,
                   .waited = now - group.arrived,
                   .uncached_tokens = prompt - group.estimate.matched_tokens,
                   .blocks = kv.BlocksFor(prompt, group.estimate.leased_tokens, samples),
                   .samples = samples};
  if (!stems_.empty() && !group.is_warm() &&
      FindJoinable(group, group.request.prompt, kv.NamespaceOf(group.request.tenant_salt))) {
    view.uncached_tokens = 0;
    view.blocks = samples;
  }
  return view;
}

void Roster::ViewRunning(const Group& group, const KvStore& kv, absl::Duration now,
                         AdmissionInput& input) const {
  int64_t fresh =
      -1;  // view of the idle samples without tokens: they start together, from the prompt
  for (int32_t i = 0; i < static_cast<int32_t>(group.samples.size()); ++i) {
    const Sample& sample = group.samples[i];
    if (sample.state == Sample::State::kDecoding) {
      const bool last = sample.stem.use_count() == 1;
      input.holding.push_back(
          {.key = group.key(i),
           .priority = group.request.priority,
           .freeable_blocks = sample.own.size() +
                              (last ? static_cast<int64_t>(sample.stem->lease.blocks().size()) : 0),
           .needs_block = CanDecode(group, i) && kv.NeedsBlock(sample)});
    }
    if (sample.state != Sample::State::kIdle || !HasReader(group)) continue;
    if (sample.tokens.empty() && fresh >= 0) {
      ++input.idle[fresh].blocks;
      continue;
    }
    if (sample.tokens.empty()) fresh = static_cast<int64_t>(input.idle.size());
    const std::vector<int32_t> path = group.Path(i);
    const PeekResult peek = kv.cache().Peek(kv.NamespaceOf(group.request.tenant_salt), path, now);
    input.idle.push_back(
        {.key = group.key(i),
         .priority = group.request.priority,
         .blocks = kv.BlocksFor(static_cast<int64_t>(path.size()), peek.leased_tokens, 1)});
  }
}

void Roster::ViewStems(const KvStore& kv, AdmissionInput& input) const {
  for (const std::shared_ptr<Stem>& stem : stems_) {
    const Sprout& first = stem->sprouts.front();
    input.holding.push_back(
        {.key = first.group->key(first.sample),
         .priority = first.group->request.priority,
         .freeable_blocks = stem->own.size() + stem->written_tokens / kv.block_tokens()});
  }
}

RowInput Roster::PrepareRows(KvStore& kv, int64_t max_rows) {
  RowInput input{.max_rows = max_rows, .block_tokens = kv.block_tokens()};
  for (const auto& [id, group] : running_) {
    for (int32_t i = 0; i < static_cast<int32_t>(group->samples.size()); ++i) {
      Sample& sample = group->samples[i];
      if (CanDecode(*group, i) && kv.Grow(sample)) {
        input.decode.push_back({group->key(i), sample.last_step});
      }
    }
  }
  for (const std::shared_ptr<Stem>& stem : stems_) {
    if (!kv.Refresh(*stem)) continue;
    input.prefill.push_back({.stem = stem->id,
                             .priority = stem->priority,
                             .first_row = stem->next_row,
                             .rows = stem->num_tokens() - stem->next_row});
  }
  return input;
}

}  // namespace coppice
