#include "server/engine/generator.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "server/engine/batch_builder.h"

namespace coppice {

absl::StatusOr<std::unique_ptr<Generator>> Generator::Create(const EngineOptions& options,
                                                             const Model& model,
                                                             const Decoder& decoder,
                                                             Metrics& metrics, const Clock& clock,
                                                             uint64_t nonce) {
  std::unique_ptr<Generator> g(new Generator(options, model, decoder, metrics, clock, nonce));
  ASSIGN_OR_RETURN(g->kv_, KvStore::Create({.num_blocks = options.num_blocks,
                                            .block_tokens = options.block_tokens,
                                            .model = model.config.name},
                                           decoder));
  ASSIGN_OR_RETURN(g->runner_, Runner::Create(decoder, model.params, options.max_batch_rows,
                                              options.max_running_samples));
  return g;
}

Generator::Generator(const EngineOptions& options, const Model& model, const Decoder& decoder,
                     Metrics& metrics, const Clock& clock, uint64_t nonce)
    : options_(options),
      model_(model),
      metrics_(metrics),
      clock_(clock),
      rollouts_(options.max_rollouts, nonce),
      prompt_states_(options.prompt_state_bytes, decoder) {}

void Generator::Enqueue(std::unique_ptr<Group> group) {
  std::vector<std::string> present;
  for (const Group* other : roster_.Select([](const Group&) { return true; })) {
    present.push_back(other->request.tenant_salt);
  }
  tenants_.Enter(group->request.tenant_salt, present);
  roster_.AddWaiting(std::move(group), *kv_, clock_.Now());
}

absl::StatusOr<bool> Generator::Step(const StepMode& mode) {
  ASSIGN_OR_RETURN(bool changed, EndGivenUp());
  if (!mode.run) return changed;
  AdmissionInput view = roster_.AdmissionView(*kv_, options_.max_running_samples, clock_.Now());
  view.open = mode.admit;
  view.tenant_tokens = tenants_.tokens();
  const AdmissionPlan admission = PlanAdmission(view);
  if (flight_.has_value() && !MayFollow(admission)) {
    RETURN_IF_ERROR(Land());
    return true;
  }
  ASSIGN_OR_RETURN(const bool moved, ApplyAdmission(admission));
  DropUnreadStems();
  DropUnfilledStates();

  const RowPlan rows = PlanRows(roster_.PrepareRows(*kv_, options_.max_batch_rows));
  changed |= moved | FinishWarmStems();
  changed |= !rows.empty() || flight_.has_value();
  std::optional<Flight> before = std::exchange(flight_, std::nullopt);
  if (!rows.empty()) {
    ASSIGN_OR_RETURN(flight_, Launch(rows, before));
  }
  if (before.has_value()) RETURN_IF_ERROR(Finish(*std::move(before)));
  if (!options_.overlap) RETURN_IF_ERROR(Land());
  RetireFinished();
  return changed;
}

bool Generator::MayFollow(const AdmissionPlan& plan) const {
  return plan.retract.empty() && plan.resume.empty() && plan.admit.empty() &&
         flight_->batch.prefill.empty() && roster_.stems().empty();
}

absl::StatusOr<bool> Generator::EndGivenUp() {
  const absl::Duration now = clock_.Now();
  if (GivenUp(now).empty()) return false;
  RETURN_IF_ERROR(Land());
  for (Group* group : GivenUp(now)) {
    metrics_.requests_aborted.Increment();
    const bool spoilt = !group->failure.ok();
    const std::string tenant_salt = group->request.tenant_salt;
    EndWithStatus(*group, *ReasonToGiveUp(*group, now));
    // Who meets its keys or values, or on a GPU shared a tile of them, would end like it.
    if (spoilt) kv_->cache().Flush(&kv_->NamespaceOf(tenant_salt));
  }
  return true;
}

std::vector<Group*> Generator::GivenUp(absl::Duration now) {
  std::vector<Group*> given_up;
  for (Group* group : roster_.Select([](const Group&) { return true; })) {
    if (ReasonToGiveUp(*group, now).has_value()) given_up.push_back(group);
  }
  return given_up;
}

std::optional<absl::Status> Generator::ReasonToGiveUp(Group& group, absl::Duration now) const {
  if (!group.failure.ok()) return group.failure;
  if (group.sink != nullptr && group.sink->Cancelled()) {
    return absl::CancelledError("generate: the caller is gone");
  }
  if (group.request.deadline.has_value() && *group.request.deadline <= now) {
    return absl::DeadlineExceededError(absl::StrCat("generate: deadline passed after ",
                                                    absl::FormatDuration(now - group.arrived),
                                                    "; give more time or ask for fewer tokens"));
  }
  if (HasReader(group)) {
    group.stalled_since = absl::InfiniteDuration();
    return std::nullopt;
  }
  group.stalled_since = std::min(group.stalled_since, now);
  if (now - group.stalled_since < options_.max_reader_stall) return std::nullopt;
  return absl::ResourceExhaustedError(absl::StrCat(
      "generate: reader stalled: no room for another token for ",
      absl::FormatDuration(now - group.stalled_since), "; read the stream as it comes"));
}

absl::StatusOr<bool> Generator::ApplyAdmission(const AdmissionPlan& plan) {
  bool changed = !plan.retract.empty();
  for (const SampleKey& key : plan.retract) {
    metrics_.preemptions.Increment();
    Retract(key);
  }
  for (const SampleKey& key : plan.resume) {
    ASSIGN_OR_RETURN(const bool started,
                     StartSprouts(*roster_.FindRunning(key.request), key.sample));
    if (!started) return changed;
    changed = true;
  }
  for (RequestId id : plan.admit) {
    ASSIGN_OR_RETURN(const bool admitted, AdmitGroup(id));
    changed |= admitted;
  }
  return changed;
}

absl::StatusOr<bool> Generator::AdmitGroup(RequestId id) {
  Group& group = roster_.Admit(id);
  ASSIGN_OR_RETURN(const bool started, StartSprouts(group, 0));
  if (!started) {
    roster_.Unadmit(id);
    return false;
  }
  group.slot.Release();
  metrics_.queue_seconds.Observe(absl::ToDoubleSeconds(clock_.Now() - group.arrived));
  return true;
}

absl::StatusOr<bool> Generator::StartSprouts(Group& group, int32_t sample) {
  std::vector<int32_t> path = group.Path(sample);
  std::shared_ptr<Stem> stem =
      roster_.FindJoinable(group, path, kv_->NamespaceOf(group.request.tenant_salt));
  if (stem == nullptr) {
    ASSIGN_OR_RETURN(stem, kv_->StartStem(group, std::move(path), clock_.Now()));
    if (stem == nullptr) return false;
    roster_.AddStem(stem);
    KeepPrompt(group, *stem);
  }
  const bool fresh = group.samples[sample].tokens.empty();
  for (int32_t i = 0; i < static_cast<int32_t>(group.samples.size()); ++i) {
    Sample& other = group.samples[i];
    if (other.state != Sample::State::kIdle) continue;
    if (i != sample && !(fresh && other.tokens.empty())) continue;
    other.state = Sample::State::kSprouting;
    stem->sprouts.push_back({&group, i});
  }
  return true;
}

void Generator::KeepPrompt(const Group& group, Stem& stem) {
  if (!prompt_states_.enabled() || !group.request.retain) return;
  if (stem.matched_tokens > 0 || stem.next_row > 0) return;
  if (stem.num_tokens() != static_cast<int64_t>(group.request.prompt.size())) return;  // resumes
  stem.kept = prompt_states_.Add(stem.tokens, kv_->policy_version());
}

void Generator::DropUnfilledStates() {
  if (!prompt_states_.enabled()) return;
  absl::flat_hash_set<const KeptPrompt*> filling;
  for (const std::shared_ptr<Stem>& stem : roster_.stems()) {
    filling.insert(stem->kept.lock().get());
  }
  prompt_states_.DropIncomplete(filling);
}

void Generator::Retract(const SampleKey& key) {
  Group* group = roster_.FindRunning(key.request);
  CHECK(group != nullptr);
  Sample& sample = group->samples[key.sample];
  if (sample.state == Sample::State::kSprouting) {
    DropStem(roster_.StemOf(*group, key.sample));
  } else if (sample.state == Sample::State::kDecoding) {
    CountWritten(kv_->Release(*group, key.sample, clock_.Now()), *group);
    sample.state = Sample::State::kIdle;
  }
}

void Generator::DropStem(const std::shared_ptr<Stem>& stem) {
  for (const Sprout& s : stem->sprouts) s.group->samples[s.sample].state = Sample::State::kIdle;
  roster_.RemoveStem(stem.get());
}

void Generator::DropUnreadStems() {
  const std::vector<std::shared_ptr<Stem>> stems = roster_.stems();
  for (const std::shared_ptr<Stem>& stem : stems) {
    const bool read = std::any_of(stem->sprouts.begin(), stem->sprouts.end(),
                                  [](const Sprout& s) { return HasReader(*s.group); });
    if (!read) DropStem(stem);
  }
}

int64_t Generator::RetractAll() {
  RestartStems();
  for (const auto& [id, group] : roster_.running()) {
    for (int32_t i = 0; i < static_cast<int32_t>(group->samples.size()); ++i) {
      Retract(group->key(i));
    }
  }
  return num_running();
}

void Generator::RestartStems() {
  const std::vector<std::shared_ptr<Stem>> stems = roster_.stems();
  for (const std::shared_ptr<Stem>& stem : stems) DropStem(stem);
}

std::vector<Lease> Generator::LeaseCached(const std::string& tenant_salt,
                                          std::vector<TrainGroup>& groups) {
  std::vector<Lease> leases;
  for (TrainGroup& group : groups) {
    leases.push_back(kv_->LeaseCached(tenant_salt, group.prompt, clock_.Now(), group.cached));
    metrics_.score_prompt_tokens.Increment(static_cast<double>(group.prompt.size()));
    metrics_.score_prompt_tokens_cached.Increment(static_cast<double>(group.cached.tokens));
  }
  return leases;
}

void Generator::SetPolicy(PolicyVersion version, bool replaced) {
  kv_->SetPolicy(version, replaced);
  prompt_states_.Clear();
  if (replaced) rollouts_.Clear();
  metrics_.policy_version.Set(static_cast<double>(Raw(version)));
}

absl::Duration Generator::NextDeadline() const {
  absl::Duration next = absl::InfiniteDuration();
  for (const Group* g : roster_.Select([](const Group&) { return true; })) {
    next = std::min({next, g->request.deadline.value_or(absl::InfiniteDuration()),
                     g->stalled_since + options_.max_reader_stall});
  }
  return next;
}

void Generator::UpdateGauges() {
  const CacheStats stats = kv_->cache().Stats();
  metrics_.blocks_free.Set(static_cast<double>(stats.free_blocks));
  metrics_.blocks_leased.Set(static_cast<double>(stats.leased_blocks));
  metrics_.blocks_cached_only.Set(static_cast<double>(stats.cached_only_blocks));
  metrics_.blocks_evicted.Increment(static_cast<double>(stats.evicted_blocks - evicted_seen_));
  evicted_seen_ = stats.evicted_blocks;
  metrics_.queue_depth.Set(static_cast<double>(num_waiting()));
  metrics_.running_requests.Set(static_cast<double>(num_running()));
  metrics_.running_samples.Set(static_cast<double>(num_running_samples()));
  metrics_.rollouts_retained.Set(static_cast<double>(rollouts_.size()));
  metrics_.prompt_state_bytes.Set(static_cast<double>(prompt_states_.size_bytes()));
}

}  // namespace coppice
