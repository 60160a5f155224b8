// Generator, the end of a step: tokens to streams, finish reasons, rollouts, and every way in which
// a request ends.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/engine/generator.h"

namespace coppice {

void Generator::Append(Group& group, int32_t index, const DrawnToken& drawn) {
  Sample& sample = group.samples[index];
  const absl::Duration now = clock_.Now();
  const PolicyVersion version = kv_->policy_version();
  if (sample.tokens.empty()) {
    sample.oldest_version = version;
    metrics_.time_to_first_token_seconds.Observe(absl::ToDoubleSeconds(now - group.arrived));
  } else {
    metrics_.inter_token_seconds.Observe(absl::ToDoubleSeconds(now - sample.last_token_at));
  }
  sample.last_token_at = now;
  sample.tokens.push_back(drawn.token);
  if (group.request.retain) sample.sampler_logprobs.push_back(drawn.tempered_logprob);
  ++group.usage.completion_tokens;
  metrics_.generation_tokens.Increment();

  TokenChunk chunk = MakeChunk(group, index, drawn);
  std::string text;
  const bool stop_token = IsStopToken(group, drawn.token);
  if (sample.text != nullptr && !stop_token) text = sample.text->Push(drawn.token);
  const std::optional<FinishReason> reason = ReasonToFinish(group, index);
  if (sample.text != nullptr && reason.has_value()) text += sample.text->Finish();
  if (group.request.return_text) chunk.text = std::move(text);
  group.sink->OnChunk(std::move(chunk));
  if (reason.has_value()) FinishSample(group, index, *reason);
}

TokenChunk Generator::MakeChunk(const Group& group, int32_t index, const DrawnToken& drawn) const {
  TokenChunk chunk{
      .sample = index, .token_ids = {drawn.token}, .policy_version = kv_->policy_version()};
  switch (group.request.logprobs) {
    case LogprobMode::kNone:
      break;
    case LogprobMode::kRaw:
      chunk.logprobs = {drawn.raw_logprob};
      break;
    case LogprobMode::kAsSampled:
      chunk.logprobs = {drawn.sampled_logprob};
      break;
  }
  if (group.request.top_logprobs > 0) chunk.top_logprobs = {drawn.top};
  return chunk;
}

bool Generator::IsStopToken(const Group& group, int32_t token) const {
  const SamplingOptions& sampling = group.request.sampling;
  const auto contains = [token](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), token) != ids.end();
  };
  return contains(sampling.stop_token_ids) ||
         (!sampling.ignore_eos && contains(model_.config.eos_tokens));
}

std::optional<FinishReason> Generator::ReasonToFinish(const Group& group, int32_t index) const {
  const Sample& sample = group.samples[index];
  if (IsStopToken(group, sample.tokens.back())) return FinishReason::kStopToken;
  if (sample.text != nullptr && sample.text->stopped()) return FinishReason::kStopString;
  if (static_cast<int64_t>(sample.tokens.size()) >= group.request.sampling.max_tokens) {
    return FinishReason::kLength;
  }
  if (group.PathLength(index) >= options_.max_context) return FinishReason::kContextFull;
  return std::nullopt;
}

void Generator::FinishSample(Group& group, int32_t index, FinishReason reason) {
  Sample& sample = group.samples[index];
  if (sample.state == Sample::State::kDecoding) {
    CountWritten(kv_->Release(group, index, clock_.Now()), group);
  }
  sample.state = Sample::State::kFinished;
  metrics_.samples_finished[static_cast<size_t>(reason)]->Increment();
  group.sink->OnSampleFinished({.sample = index,
                                .reason = reason,
                                .num_tokens = static_cast<int32_t>(sample.tokens.size())});
}

void Generator::RetireFinished() {
  for (Group* group : roster_.Select([](const Group& g) { return g.unfinished() == 0; })) {
    if (group->is_warm()) {
      group->warm(WarmResult{.usage = group->usage, .policy_version = kv_->policy_version()});
    } else {
      const std::string rollout_id = group->request.retain ? Retain(*group) : "";
      group->sink->OnDone(absl::OkStatus(), group->usage, rollout_id, kv_->policy_version());
    }
    roster_.Remove(group->id);
  }
}

std::string Generator::Retain(const Group& group) {
  const float temperature = group.request.sampling.temperature;
  Rollout rollout{.prompt = group.request.prompt,
                  .temperature = temperature > 0 ? temperature : 1,
                  .oldest_version = group.samples[0].oldest_version,
                  .tenant_salt = group.request.tenant_salt,
                  .kept_prompt = group.kept_prompt};
  for (const Sample& sample : group.samples) {
    rollout.samples.push_back({sample.tokens, sample.sampler_logprobs});
    rollout.oldest_version = std::min(rollout.oldest_version, sample.oldest_version);
  }
  if (prompt_states_.enabled()) {
    const std::shared_ptr<const KeptPrompt> state = rollout.kept_prompt.lock();
    const bool kept = state != nullptr && state->complete();
    (kept ? metrics_.prompt_states_kept : metrics_.prompt_states_missed).Increment();
  }
  return rollouts_.Add(std::move(rollout));
}

int64_t Generator::Abort(const std::string& request_id, const std::string& session_id) {
  const std::vector<Group*> named = roster_.Select([&](const Group& g) {
    return (!request_id.empty() && g.request.request_id == request_id) ||
           (!session_id.empty() && g.request.session_id == session_id);
  });
  for (Group* group : named) {
    metrics_.requests_aborted.Increment();
    EndEarly(*group, FinishReason::kAborted);
  }
  return static_cast<int64_t>(named.size());
}

int64_t Generator::EndRunning() {
  const std::vector<Group*> running =
      roster_.Select([this](const Group& g) { return roster_.FindRunning(g.id) != nullptr; });
  for (Group* group : running) EndEarly(*group, FinishReason::kPaused);
  return static_cast<int64_t>(running.size());
}

void Generator::Fail(const absl::Status& status) {
  flight_.reset();  // its draws are for nobody
  for (Group* group : roster_.Select([](const Group&) { return true; })) {
    EndWithStatus(*group, status);
  }
}

void Generator::EndEarly(Group& group, FinishReason reason) {
  if (!group.started) {
    const char* why = reason == FinishReason::kAborted ? "aborted" : "paused";
    EndWithStatus(group,
                  absl::CancelledError(absl::StrCat("generate: ", why, " before it started")));
    return;
  }
  roster_.Detach(group);
  for (int32_t i = 0; i < static_cast<int32_t>(group.samples.size()); ++i) {
    Sample& sample = group.samples[i];
    if (sample.state == Sample::State::kFinished) continue;
    const std::string text = sample.text != nullptr ? sample.text->Finish() : "";
    if (group.request.return_text && !text.empty()) {
      group.sink->OnChunk({.sample = i, .text = text, .policy_version = kv_->policy_version()});
    }
    FinishSample(group, i, reason);
  }
  group.sink->OnDone(absl::OkStatus(), group.usage, "", kv_->policy_version());
  roster_.Remove(group.id);
}

void Generator::EndWithStatus(Group& group, const absl::Status& status) {
  roster_.Detach(group);
  for (int32_t i = 0; i < static_cast<int32_t>(group.samples.size()); ++i) {
    if (!group.is_warm() && group.samples[i].state != Sample::State::kFinished) {
      metrics_.samples_finished[static_cast<size_t>(FinishReason::kAborted)]->Increment();
    }
    CountWritten(kv_->Release(group, i, clock_.Now()), group);
  }
  if (group.is_warm()) {
    group.warm(status);
  } else {
    group.sink->OnDone(status, group.usage, "", kv_->policy_version());
  }
  roster_.Remove(group.id);
}

}  // namespace coppice
