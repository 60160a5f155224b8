// Generator, the middle of a step: the batch and what was drawn from it.
#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "kernels/base/check.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "server/engine/batch_builder.h"
#include "server/engine/generator.h"

namespace coppice {
namespace {

// Ends it at the next turn, and says so once: nobody else can tell it from a client's abort.
void FailForNothingToDraw(Group& group) {
  group.failure = absl::FailedPreconditionError(
      "generate: want finite logits, got NaN or infinity; the weights are damaged, or this prompt "
      "leaves the range of f16: use --compute_dtype=bf16");
  LOG(WARNING) << "request_without_numbers request=\"" << absl::CHexEscape(group.request.request_id)
               << "\" prompt_tokens=" << group.request.prompt.size();
}

}  // namespace

absl::StatusOr<Generator::Flight> Generator::Launch(const RowPlan& plan,
                                                    const std::optional<Flight>& before) {
  Flight flight{.batch = Build(plan, before)};
  Batch& batch = flight.batch;
  const ops::TokenBatch tokens = BuildTokenBatch(batch.segments, kv_->block_tokens());
  flight.queued_at = clock_.Now();
  ASSIGN_OR_RETURN(flight.draws, runner_->Start({.batch = tokens,
                                                 .draws = batch.draws,
                                                 .kept = std::move(batch.kept),
                                                 .carried = std::move(batch.carried)},
                                                kv_->pool()));
  return flight;
}

Generator::Batch Generator::Build(const RowPlan& plan, const std::optional<Flight>& before) {
  Batch batch;
  ++step_;
  for (const SampleKey& key : plan.decode)
    AddDecode(*roster_.FindRunning(key.request), key.sample, before, batch);
  for (const PrefillRows& p : plan.prefill) AddPrefill(roster_.FindStem(p.stem), p.rows, batch);
  return batch;
}

void Generator::AddDecode(Group& group, int32_t index, const std::optional<Flight>& before,
                          Batch& batch) {
  Sample& sample = group.samples[index];
  sample.last_step = step_;
  const bool in_flight = group.HasTokenInFlight(index);
  if (in_flight) CarryToken(group.key(index), before->batch, batch);
  batch.segments.push_back({.blocks = SampleBlocks(sample, kv_->block_tokens()),
                            .context_tokens = sample.kv_tokens,
                            .tokens = {in_flight ? 0 : sample.tokens.back()},
                            .stored_tokens = sample.kv_tokens,
                            .wants_logits = true});
  ++sample.kv_tokens;
  ++batch.rows;
  AddDraw({&group, index}, sample.kv_tokens, batch);
  ++batch.head_rows;
  tenants_.Charge(group.request.tenant_salt, 1);
}

void Generator::AddPrefill(const std::shared_ptr<Stem>& stem, int64_t rows, Batch& batch) {
  const auto begin = stem->tokens.begin() + stem->next_row;
  const bool ends = stem->wants_logits && stem->next_row + rows == stem->num_tokens();
  batch.segments.push_back({.blocks = stem->Blocks(),
                            .context_tokens = stem->next_row,
                            .tokens = {begin, begin + rows},
                            .stored_tokens = stem->ready_tokens,
                            .wants_logits = ends});
  std::shared_ptr<KeptPrompt> kept = stem->kept.lock();
  if (kept != nullptr && kept->rows_filled != stem->next_row) {
    stem->kept.reset();  // a gap: it will never be complete
  } else if (kept != nullptr) {
    batch.kept.push_back({batch.rows, rows, std::move(kept)});
  }
  batch.rows += rows;
  batch.prefill.emplace_back(stem, rows);
  if (ends) {
    SetAsideSlowReaders(*stem);
    for (const Sprout& sprout : stem->sprouts) AddDraw(sprout, stem->num_tokens(), batch);
    ++batch.head_rows;
  }
  tenants_.Charge(stem->sprouts.front().group->request.tenant_salt, static_cast<double>(rows));
}

void Generator::SetAsideSlowReaders(Stem& stem) {
  std::vector<Sprout> kept;
  for (const Sprout& s : stem.sprouts) {
    if (HasReader(*s.group)) {
      kept.push_back(s);
    } else {
      s.group->samples[s.sample].state = Sample::State::kIdle;
    }
  }
  CHECK(!kept.empty());  // the stem was kept for a reader, and only this thread fills one
  stem.sprouts = std::move(kept);
}

void Generator::CarryToken(const SampleKey& key, const Batch& before, Batch& batch) {
  const auto at = std::lower_bound(before.keys.begin(), before.keys.end(), key);
  CHECK(at != before.keys.end() && *at == key);
  const int64_t draw = at - before.keys.begin();
  CarriedTokens* last = batch.carried.empty() ? nullptr : &batch.carried.back();
  if (last != nullptr && last->row + last->n == batch.rows && last->draw + last->n == draw) {
    ++last->n;
  } else {
    batch.carried.push_back({.row = batch.rows, .draw = draw, .n = 1});
  }
}

void Generator::AddDraw(const Sprout& drawer, int64_t position, Batch& batch) {
  const Group& group = *drawer.group;
  batch.draws.push_back({.options = &group.request.sampling,
                         .seed = group.seed,
                         .sample = drawer.sample,
                         .position = position,
                         .head_row = batch.head_rows,
                         .top_logprobs = group.request.top_logprobs});
  batch.drawers.push_back(drawer);
  batch.keys.push_back(group.key(drawer.sample));
}

absl::Status Generator::Land() {
  if (!flight_.has_value()) return absl::OkStatus();
  return Finish(*std::exchange(flight_, std::nullopt));
}

absl::Status Generator::Finish(Flight flight) {
  std::vector<DrawnToken> drawn;
  if (flight.draws != nullptr) {
    ASSIGN_OR_RETURN(drawn, flight.draws->Wait());
  }
  const absl::Duration now = clock_.Now();
  metrics_.run_seconds.Observe(absl::ToDoubleSeconds(now - std::max(flight.queued_at, landed_at_)));
  landed_at_ = now;
  RETURN_IF_ERROR(Publish(flight.batch, drawn));
  ForgetEnded();
  RetireFinished();
  return absl::OkStatus();
}

void Generator::ForgetEnded() {
  if (!flight_.has_value()) return;
  for (Sprout& drawer : flight_->batch.drawers) {
    if (drawer.group == nullptr) continue;
    const Sample& sample = drawer.group->samples[drawer.sample];
    if (sample.state == Sample::State::kFinished) drawer.group = nullptr;
  }
}

absl::Status Generator::Publish(const Batch& batch, const std::vector<DrawnToken>& drawn) {
  for (const auto& [stem, rows] : batch.prefill) {
    kv_->Advance(*stem, rows);
    if (stem->complete() && stem->wants_logits) StartStreams(*stem);
  }
  for (size_t i = 0; i < drawn.size(); ++i) {
    if (batch.drawers[i].group == nullptr) continue;
    Group& group = *batch.drawers[i].group;
    if (drawn[i].token < 0 && group.failure.ok()) FailForNothingToDraw(group);
    if (group.failure.ok()) {
      Append(group, batch.drawers[i].sample, drawn[i]);
    } else {  // a row may be queued behind the token that did not come
      Sample& sample = group.samples[batch.drawers[i].sample];
      sample.kv_tokens = std::min(sample.kv_tokens, group.PathLength(batch.drawers[i].sample));
    }
  }
  for (const auto& [stem, rows] : batch.prefill) {
    if (stem->complete() && stem->wants_logits) RETURN_IF_ERROR(ForkUnfinished(stem));
  }
  FinishWarmStems();
  return absl::OkStatus();
}

void Generator::StartStreams(const Stem& stem) {
  bool pays = true;  // the first request in line has computed the prompt; the others joined it
  for (const Sprout& sprout : stem.sprouts) {
    Group& group = *sprout.group;
    if (group.started) continue;
    SettleUsage(stem, pays, group);
    group.kept_prompt = stem.kept;
    group.sink->OnStarted(group.seed, group.usage, kv_->policy_version());
    pays = false;
  }
}

void Generator::SettleUsage(const Stem& stem, bool pays, Group& group) {
  group.started = true;
  Usage& usage = group.usage;
  usage.prompt_tokens = static_cast<int32_t>(stem.num_tokens());
  usage.cached_device_tokens = static_cast<int32_t>(stem.cached_tokens);
  usage.computed_tokens = pays ? static_cast<int32_t>(stem.computed_tokens) : 0;
  usage.joined_tokens = usage.prompt_tokens - usage.cached_device_tokens - usage.computed_tokens;
  if (pays) CountWritten(stem.written_tokens, group);
  usage.miss_reason = stem.miss_reason;
  metrics_.prompt_tokens_queried.Increment(usage.prompt_tokens);
  metrics_.prompt_tokens_hit_device.Increment(usage.cached_device_tokens);
  metrics_.prompt_tokens_joined.Increment(usage.joined_tokens);
  metrics_.prompt_tokens_computed.Increment(usage.computed_tokens);
  if (usage.miss_reason != MissReason::kNone) {
    const size_t reason = static_cast<size_t>(usage.miss_reason) - 1;
    metrics_.prompt_tokens_missed[reason]->Increment(usage.computed_tokens);
  }
}

void Generator::CountWritten(int64_t tokens, Group& group) {
  group.usage.written_tokens += static_cast<int32_t>(tokens);
  metrics_.prompt_tokens_written.Increment(static_cast<double>(tokens));
}

absl::Status Generator::ForkUnfinished(const std::shared_ptr<Stem>& stem) {
  std::vector<Sprout> unfinished;
  for (const Sprout& s : stem->sprouts) {
    if (s.group->samples[s.sample].state == Sample::State::kSprouting) unfinished.push_back(s);
  }
  RETURN_IF_ERROR(kv_->Fork(stem, unfinished));
  for (const Sprout& s : unfinished) {
    if (s.group->samples[s.sample].state == Sample::State::kIdle) metrics_.preemptions.Increment();
  }
  if (unfinished.empty()) {
    Group& first = *stem->sprouts.front().group;
    CountWritten(kv_->PublishLate(*stem, first.request, clock_.Now()), first);
  }
  roster_.RemoveStem(stem.get());
  return absl::OkStatus();
}

bool Generator::FinishWarmStems() {
  const std::vector<std::shared_ptr<Stem>> stems = roster_.stems();
  bool any = false;
  for (const std::shared_ptr<Stem>& stem : stems) {
    if (stem->wants_logits || !stem->complete()) continue;
    bool pays = true;
    for (const Sprout& sprout : stem->sprouts) {
      SettleUsage(*stem, pays, *sprout.group);
      sprout.group->samples[sprout.sample].state = Sample::State::kFinished;
      pays = false;
    }
    roster_.RemoveStem(stem.get());
    any = true;
  }
  return any;
}

}  // namespace coppice
