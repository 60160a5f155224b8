#include "server/router/router_metrics.h"

#include <cstddef>

#include "prometheus/text_serializer.h"

namespace coppice {
namespace {

using prometheus::Histogram;
using prometheus::Labels;
using prometheus::Registry;

prometheus::Counter& AddCounter(Registry& registry, const char* name, const char* help,
                                const Labels& labels = {}) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add(labels);
}

prometheus::Family<prometheus::Gauge>& AddGauges(Registry& registry, const char* name,
                                                 const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}

Histogram& AddHistogram(Registry& registry, const char* name, const char* help,
                        const Histogram::BucketBoundaries& buckets) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
}

template <size_t N>
std::array<prometheus::Counter*, N> AddByLabel(Registry& registry, const char* name,
                                               const char* help, const char* label,
                                               const std::array<const char*, N>& values) {
  std::array<prometheus::Counter*, N> counters;
  for (size_t i = 0; i < N; ++i) {
    counters[i] = &AddCounter(registry, name, help, {{label, values[i]}});
  }
  return counters;
}

prometheus::Counter& AddEjections(Registry& registry, const char* reason) {
  return AddCounter(registry, "coppice_router_ejections_total",
                    "Replicas taken out of service, by what they failed.", {{"reason", reason}});
}

prometheus::Gauge& AddReplicas(Registry& registry, const char* state) {
  return AddGauges(registry, "coppice_router_replicas", "Replicas by state.")
      .Add({{"state", state}});
}

prometheus::Gauge& AddMismatches(Registry& registry, const char* kind) {
  return AddGauges(registry, "coppice_router_replica_mismatches",
                   "Replicas that differ from the leader, by what differs.")
      .Add({{"kind", kind}});
}

// A tenth of a millisecond to a minute.
Histogram::BucketBoundaries FirstByteBuckets() {
  return {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05,
          0.1,    0.25,    0.5,    1,     2.5,    5,     10,   30,    60};
}

// A microsecond to ten milliseconds.
Histogram::BucketBoundaries PlacementBuckets() {
  return {0.000001, 0.0000025, 0.000005, 0.00001, 0.000025, 0.00005, 0.0001, 0.001, 0.01};
}

}  // namespace

RouterMetrics::RouterMetrics()
    : registry_(std::make_shared<Registry>()),
      requests(AddByLabel(*registry_, "coppice_router_requests_total", "Calls taken, by kind.",
                          "rpc", kRouteLabels)),
      responses(AddByLabel(*registry_, "coppice_router_responses_total",
                           "Calls answered, by outcome; client: the request was at fault.", "code",
                           kCodeLabels)),
      placements(AddByLabel(*registry_, "coppice_router_placements_total",
                            "Requests placed, by what decided.", "reason", kPlacedByLabels)),
      prompt_tokens(AddCounter(*registry_, "coppice_router_prompt_tokens_total",
                               "Prompt tokens of answered Generate calls.")),
      hit_tokens_predicted(AddCounter(*registry_, "coppice_router_hit_tokens_predicted_total",
                                      "Of them, believed to be in the replica's cache.")),
      hit_tokens_confirmed(AddCounter(*registry_, "coppice_router_hit_tokens_confirmed_total",
                                      "Of them, found there, or computed for another request.")),
      retries(AddCounter(*registry_, "coppice_router_retries_total",
                         "Attempts after the first, before any byte was answered.")),
      rollouts_fetched(AddCounter(*registry_, "coppice_router_rollouts_fetched_total",
                                  "Rollouts brought from their homes to the leader.")),
      ejections_health(AddEjections(*registry_, "health")),
      ejections_first_byte(AddEjections(*registry_, "first_byte")),
      resolve_failures(AddCounter(*registry_, "coppice_router_resolve_failures_total",
                                  "Resolutions of --replica_dns that failed.")),
      open_requests(AddGauges(*registry_, "coppice_router_open_requests", "Calls open.").Add({})),
      replicas_serving(AddReplicas(*registry_, "serving")),
      replicas_ejected(AddReplicas(*registry_, "ejected")),
      replicas_mismatched(AddReplicas(*registry_, "mismatched")),
      model_mismatches(AddMismatches(*registry_, "model")),
      policy_mismatches(AddMismatches(*registry_, "policy_version")),
      time_to_first_byte_seconds(AddHistogram(
          *registry_, "coppice_router_time_to_first_byte_seconds",
          "Seconds from a call's arrival to the first message of its answer.", FirstByteBuckets())),
      placement_seconds(AddHistogram(
          *registry_, "coppice_router_placement_seconds",
          "Seconds of choosing a replica; reading the request comes before.", PlacementBuckets())),
      replica_load_tokens_(AddGauges(*registry_, "coppice_router_replica_load_tokens",
                                     "Expected decode tokens that are open, by replica.")),
      replica_open_requests_(
          AddGauges(*registry_, "coppice_router_replica_open_requests", "Calls open, by replica.")),
      replica_up_(AddGauges(*registry_, "coppice_router_replica_up",
                            "1 if the replica gets requests, else 0.")),
      replica_policy_version_(AddGauges(*registry_, "coppice_router_replica_policy_version",
                                        "Policy version that the replica last reported.")) {}

std::string RouterMetrics::Serialize() const {
  return prometheus::TextSerializer().Serialize(registry_->Collect());
}

RouterMetrics::Replica::Replica(RouterMetrics& metrics, const std::string& name)
    : metrics_(metrics),
      load_tokens(metrics.replica_load_tokens_.Add({{"replica", name}})),
      open_requests(metrics.replica_open_requests_.Add({{"replica", name}})),
      up(metrics.replica_up_.Add({{"replica", name}})),
      policy_version(metrics.replica_policy_version_.Add({{"replica", name}})) {}

RouterMetrics::Replica::~Replica() {
  metrics_.replica_load_tokens_.Remove(&load_tokens);
  metrics_.replica_open_requests_.Remove(&open_requests);
  metrics_.replica_up_.Remove(&up);
  metrics_.replica_policy_version_.Remove(&policy_version);
}

}  // namespace coppice
