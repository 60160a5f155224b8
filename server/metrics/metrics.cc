#include "server/metrics/metrics.h"

#include <cstddef>

#include "prometheus/text_serializer.h"

namespace coppice {
namespace {

// Label values of `phase`, in the order of Metrics::train_phase_seconds_.
constexpr std::array<const char*, 7> kPhases = {"build_tree", "forward",   "head", "loss",
                                                "backward",   "optimizer", "other"};

using prometheus::Histogram;
using prometheus::Labels;
using prometheus::Registry;

// A family that exists already under this name and help is reused, so states, tiers and reasons
// share one.
prometheus::Counter& AddCounter(Registry& registry, const char* name, const char* help,
                                const Labels& labels = {}) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add(labels);
}

prometheus::Gauge& AddGauge(Registry& registry, const char* name, const char* help,
                            const Labels& labels = {}) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add(labels);
}

Histogram& AddHistogram(Registry& registry, const char* name, const char* help,
                        const Histogram::BucketBoundaries& buckets, const Labels& labels = {}) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(labels, buckets);
}

prometheus::Gauge& AddBlocks(Registry& registry, const char* state) {
  return AddGauge(registry, "coppice_kv_blocks",
                  "KV blocks by state; the states add up to the pool.", {{"state", state}});
}

template <size_t N>
std::array<prometheus::Counter*, N> AddByReason(Registry& registry, const char* name,
                                                const char* help,
                                                const std::array<const char*, N>& reasons) {
  std::array<prometheus::Counter*, N> counters;
  for (size_t i = 0; i < N; ++i) {
    counters[i] = &AddCounter(registry, name, help, {{"reason", reasons[i]}});
  }
  return counters;
}

std::array<Histogram*, 7> AddPhases(Registry& registry,
                                    const Histogram::BucketBoundaries& buckets) {
  std::array<Histogram*, 7> histograms;
  for (size_t i = 0; i < kPhases.size(); ++i) {
    histograms[i] =
        &AddHistogram(registry, "coppice_train_step_phase_seconds",
                      "Seconds of a training step by phase.", buckets, {{"phase", kPhases[i]}});
  }
  return histograms;
}

// Half a millisecond to a minute: a token on a GPU, a long prompt on a CPU.
Histogram::BucketBoundaries LatencyBuckets() {
  return {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60};
}

// A millisecond to ten minutes: phases of an update.
Histogram::BucketBoundaries PhaseBuckets() {
  return {0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600};
}

}  // namespace

Metrics::Metrics()
    : registry_(std::make_shared<Registry>()),
      prompt_tokens_queried(AddCounter(*registry_, "coppice_prompt_tokens_total",
                                       "Prompt tokens of admitted requests.")),
      prompt_tokens_hit_device(AddCounter(*registry_, "coppice_prompt_tokens_hit_total",
                                          "Prompt tokens whose KV was in the cache, by tier.",
                                          {{"tier", "device"}})),
      prompt_tokens_joined(AddCounter(*registry_, "coppice_prompt_tokens_joined_total",
                                      "Prompt tokens computed by another request in flight.")),
      prompt_tokens_computed(AddCounter(*registry_, "coppice_prompt_tokens_computed_total",
                                        "Prompt tokens computed for the request itself.")),
      prompt_tokens_missed(AddByReason(*registry_, "coppice_prompt_tokens_missed_total",
                                       "Prompt tokens that were not in the cache, by reason.",
                                       kMissReasonLabels)),
      prompt_tokens_written(AddCounter(*registry_, "coppice_prompt_tokens_written_total",
                                       "Tokens newly published to the cache.")),
      blocks_free(AddBlocks(*registry_, "free")),
      blocks_leased(AddBlocks(*registry_, "leased")),
      blocks_cached_only(AddBlocks(*registry_, "cached_only")),
      blocks_evicted(AddCounter(*registry_, "coppice_kv_blocks_evicted_total",
                                "KV blocks evicted to make room.")),
      queue_depth(
          AddGauge(*registry_, "coppice_queue_depth_requests", "Requests waiting to start.")),
      queue_seconds(AddHistogram(*registry_, "coppice_queue_seconds",
                                 "Seconds from arrival to the first scheduled step.",
                                 LatencyBuckets())),
      time_to_first_token_seconds(AddHistogram(*registry_, "coppice_time_to_first_token_seconds",
                                               "Seconds from arrival to a sample's first token.",
                                               LatencyBuckets())),
      inter_token_seconds(AddHistogram(*registry_, "coppice_inter_token_seconds",
                                       "Seconds between two tokens of a sample.",
                                       LatencyBuckets())),
      running_requests(AddGauge(*registry_, "coppice_running_requests", "Requests running.")),
      running_samples(AddGauge(*registry_, "coppice_running_samples", "Samples running.")),
      generation_tokens(
          AddCounter(*registry_, "coppice_generation_tokens_total", "Tokens sampled.")),
      samples_finished(AddByReason(*registry_, "coppice_samples_finished_total",
                                   "Samples finished, by reason.", kFinishReasonLabels)),
      requests_aborted(
          AddCounter(*registry_, "coppice_requests_aborted_total",
                     "Requests that were cancelled, aborted, ran out of time or had no numbers "
                     "to draw from.")),
      requests_rejected(AddCounter(*registry_, "coppice_requests_rejected_total",
                                   "Requests refused because the queue was full.")),
      preemptions(AddCounter(*registry_, "coppice_preemptions_total",
                             "Samples retracted to make room for older ones.")),
      step_seconds(AddHistogram(*registry_, "coppice_engine_step_seconds",
                                "Seconds of one engine step with work.", LatencyBuckets())),
      run_seconds(AddHistogram(*registry_, "coppice_engine_run_seconds",
                               "Seconds of one generation batch: planning its kernels, queueing "
                               "and awaiting them. The rest of a step is the host's alone. With "
                               "--overlap, from the end of the batch before.",
                               LatencyBuckets())),
      policy_version(AddGauge(*registry_, "coppice_policy_version",
                              "Version of the weights: committed updates.")),
      train_steps(AddCounter(*registry_, "coppice_train_steps_total", "Updates committed.")),
      train_steps_skipped(AddCounter(*registry_, "coppice_train_steps_skipped_total",
                                     "Updates skipped for a gradient norm that is not finite.")),
      train_tokens_unique(AddCounter(*registry_, "coppice_train_tokens_unique_total",
                                     "Tokens run by training: every shared prefix once.")),
      train_tokens_flat(AddCounter(*registry_, "coppice_train_tokens_flat_total",
                                   "Tokens that training without sharing would have run.")),
      gradient_scale(AddGauge(*registry_, "coppice_gradient_scale",
                              "Power of two that the last gradients other than zero were scaled "
                              "by; 1 where the device does not compute in f16.")),
      train_prompt_tokens_reused(
          AddCounter(*registry_, "coppice_train_prompt_tokens_reused_total",
                     "Prompt tokens of training whose forward pass was generation's.")),
      score_prompt_tokens(
          AddCounter(*registry_, "coppice_score_prompt_tokens_total", "Prompt tokens of Score.")),
      score_prompt_tokens_cached(AddCounter(
          *registry_, "coppice_score_prompt_tokens_cached_total",
          "Prompt tokens of Score whose KV was read from the cache instead of computed.")),
      rollouts_retained(
          AddGauge(*registry_, "coppice_rollouts_retained", "Rollouts kept for training by id.")),
      prompt_state_bytes(AddGauge(*registry_, "coppice_prompt_state_bytes",
                                  "Device memory of prompt states kept for the next update.")),
      prompt_states_kept(AddCounter(*registry_, "coppice_prompt_states_kept_total",
                                    "Rollouts retained with the state of their prompt.")),
      prompt_states_missed(
          AddCounter(*registry_, "coppice_prompt_states_missed_total",
                     "Rollouts retained without it: cached in part, joined, or out of budget.")),
      weight_sync_bytes(AddCounter(*registry_, "coppice_weight_sync_bytes_total",
                                   "Bytes copied from trainer to generator: 0 by design.")),
      train_phase_seconds_(AddPhases(*registry_, PhaseBuckets())) {}

std::string Metrics::Serialize() const {
  return prometheus::TextSerializer().Serialize(registry_->Collect());
}

prometheus::Histogram& Metrics::TrainPhaseSeconds(const std::string& phase) {
  for (size_t i = 0; i < kPhases.size(); ++i) {
    if (phase == kPhases[i]) return *train_phase_seconds_[i];
  }
  return *train_phase_seconds_.back();
}

}  // namespace coppice
