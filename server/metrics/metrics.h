// Every metric of the daemon as one struct of references, built once and injected. Names coppice_*,
// base units, labels from closed sets only. Updating a metric is lock-free or a short lock inside
// prometheus-cpp: any thread.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace coppice {

// Label values of `reason` in order of MissReason (cache/radix_cache.h), kNone excluded.
inline constexpr std::array<const char*, 8> kMissReasonLabels = {
    "none_stored",         "evicted",   "policy_version",  "namespace", "below_block",
    "no_state_checkpoint", "opted_out", "routed_elsewhere"};
// Label values of `reason` in order of FinishReason (server/engine/request.h).
inline constexpr std::array<const char*, 6> kFinishReasonLabels = {
    "stop_token", "stop_string", "length", "aborted", "context_full", "paused"};

class Metrics {
 public:
  Metrics();

  prometheus::Registry& registry() { return *registry_; }
  // Text exposition format, for GET /metrics.
  std::string Serialize() const;

 private:
  std::shared_ptr<prometheus::Registry> registry_;

 public:
  // ---- Prefix cache
  prometheus::Counter& prompt_tokens_queried;     // coppice_prompt_tokens_total
  prometheus::Counter& prompt_tokens_hit_device;  // coppice_prompt_tokens_hit_total{tier="device"}
  prometheus::Counter& prompt_tokens_joined;      // coppice_prompt_tokens_joined_total
  prometheus::Counter& prompt_tokens_computed;    // coppice_prompt_tokens_computed_total
  // coppice_prompt_tokens_missed_total{reason}
  std::array<prometheus::Counter*, 8> prompt_tokens_missed;
  prometheus::Counter& prompt_tokens_written;  // coppice_prompt_tokens_written_total
  prometheus::Gauge& blocks_free;              // coppice_kv_blocks{state="free"}
  prometheus::Gauge& blocks_leased;            // coppice_kv_blocks{state="leased"}
  prometheus::Gauge& blocks_cached_only;       // coppice_kv_blocks{state="cached_only"}
  prometheus::Counter& blocks_evicted;         // coppice_kv_blocks_evicted_total

  // ---- Requests
  prometheus::Gauge& queue_depth;                        // coppice_queue_depth_requests
  prometheus::Histogram& queue_seconds;                  // coppice_queue_seconds
  prometheus::Histogram& time_to_first_token_seconds;    // coppice_time_to_first_token_seconds
  prometheus::Histogram& inter_token_seconds;            // coppice_inter_token_seconds
  prometheus::Gauge& running_requests;                   // coppice_running_requests
  prometheus::Gauge& running_samples;                    // coppice_running_samples
  prometheus::Counter& generation_tokens;                // coppice_generation_tokens_total
  std::array<prometheus::Counter*, 6> samples_finished;  // coppice_samples_finished_total{reason}
  prometheus::Counter& requests_aborted;                 // coppice_requests_aborted_total
  prometheus::Counter& requests_rejected;  // coppice_requests_rejected_total (queue full)
  prometheus::Counter& preemptions;        // coppice_preemptions_total
  prometheus::Histogram& step_seconds;     // coppice_engine_step_seconds
  prometheus::Histogram& run_seconds;      // coppice_engine_run_seconds

  // ---- Training
  prometheus::Gauge& policy_version;         // coppice_policy_version
  prometheus::Counter& train_steps;          // coppice_train_steps_total
  prometheus::Counter& train_steps_skipped;  // coppice_train_steps_skipped_total
  prometheus::Counter& train_tokens_unique;  // coppice_train_tokens_unique_total
  prometheus::Counter& train_tokens_flat;    // coppice_train_tokens_flat_total
  prometheus::Gauge& gradient_scale;         // coppice_gradient_scale
  // coppice_train_prompt_tokens_reused_total
  prometheus::Counter& train_prompt_tokens_reused;
  prometheus::Counter& score_prompt_tokens;         // coppice_score_prompt_tokens_total
  prometheus::Counter& score_prompt_tokens_cached;  // coppice_score_prompt_tokens_cached_total
  prometheus::Gauge& rollouts_retained;             // coppice_rollouts_retained
  prometheus::Gauge& prompt_state_bytes;            // coppice_prompt_state_bytes
  prometheus::Counter& prompt_states_kept;          // coppice_prompt_states_kept_total
  prometheus::Counter& prompt_states_missed;        // coppice_prompt_states_missed_total
  prometheus::Counter& weight_sync_bytes;  // coppice_weight_sync_bytes_total: 0 by design (P1)
  // coppice_train_step_phase_seconds{phase}; phases: build_tree, forward, head, loss, backward,
  // optimizer, other.
  prometheus::Histogram& TrainPhaseSeconds(const std::string& phase);

 private:
  std::array<prometheus::Histogram*, 7> train_phase_seconds_;
};

}  // namespace coppice
