// Every metric of the router as one struct of references, built once and injected; the daemon's own
// are in server/metrics. Names coppice_router_*; labels from closed sets, but for `replica`, whose
// series end when the replica leaves. Any thread.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace coppice {

// Label values of `rpc`, in order of Route (server/router/routes.h).
inline constexpr std::array<const char*, 8> kRouteLabels = {
    "generate", "warm", "score", "generation_other", "training", "cache", "admin", "unknown"};
// Label values of `code`.
inline constexpr std::array<const char*, 7> kCodeLabels = {
    "ok",      "client", "unavailable", "resource_exhausted", "cancelled", "deadline_exceeded",
    "internal"};
// Label values of `reason`, in order of PlacedBy (server/placement/placement.h).
inline constexpr std::array<const char*, 4> kPlacedByLabels = {"home", "session", "prefix",
                                                               "balance"};

class RouterMetrics {
 public:
  RouterMetrics();

  // Text exposition format, for GET /metrics.
  std::string Serialize() const;

 private:
  std::shared_ptr<prometheus::Registry> registry_;

 public:
  std::array<prometheus::Counter*, 8> requests;    // coppice_router_requests_total{rpc}
  std::array<prometheus::Counter*, 7> responses;   // coppice_router_responses_total{code}
  std::array<prometheus::Counter*, 4> placements;  // coppice_router_placements_total{reason}
  prometheus::Counter& prompt_tokens;              // coppice_router_prompt_tokens_total
  prometheus::Counter& hit_tokens_predicted;       // coppice_router_hit_tokens_predicted_total
  prometheus::Counter& hit_tokens_confirmed;       // coppice_router_hit_tokens_confirmed_total
  prometheus::Counter& retries;                    // coppice_router_retries_total
  prometheus::Counter& rollouts_fetched;           // coppice_router_rollouts_fetched_total
  prometheus::Counter& ejections_health;      // coppice_router_ejections_total{reason="health"}
  prometheus::Counter& ejections_first_byte;  // coppice_router_ejections_total{reason="first_byte"}
  prometheus::Counter& resolve_failures;      // coppice_router_resolve_failures_total
  prometheus::Gauge& open_requests;           // coppice_router_open_requests
  prometheus::Gauge& replicas_serving;        // coppice_router_replicas{state="serving"}
  prometheus::Gauge& replicas_ejected;        // coppice_router_replicas{state="ejected"}
  prometheus::Gauge& replicas_mismatched;     // coppice_router_replicas{state="mismatched"}
  prometheus::Gauge& model_mismatches;        // coppice_router_replica_mismatches{kind="model"}
  prometheus::Gauge& policy_mismatches;  // coppice_router_replica_mismatches{kind="policy_version"}
  prometheus::Histogram& time_to_first_byte_seconds;  // coppice_router_time_to_first_byte_seconds
  prometheus::Histogram& placement_seconds;           // coppice_router_placement_seconds

  // One replica's gauges; they end with the object.
  class Replica {
   public:
    Replica(RouterMetrics& metrics, const std::string& name);
    ~Replica();
    Replica(const Replica&) = delete;
    Replica& operator=(const Replica&) = delete;

   private:
    RouterMetrics& metrics_;

   public:
    prometheus::Gauge& load_tokens;     // coppice_router_replica_load_tokens{replica}
    prometheus::Gauge& open_requests;   // coppice_router_replica_open_requests{replica}
    prometheus::Gauge& up;              // coppice_router_replica_up{replica}
    prometheus::Gauge& policy_version;  // coppice_router_replica_policy_version{replica}
  };

 private:
  prometheus::Family<prometheus::Gauge>& replica_load_tokens_;
  prometheus::Family<prometheus::Gauge>& replica_open_requests_;
  prometheus::Family<prometheus::Gauge>& replica_up_;
  prometheus::Family<prometheus::Gauge>& replica_policy_version_;
};

}  // namespace coppice
