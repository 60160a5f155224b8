#include "server/metrics/metrics.h"

#include <map>
#include <string>

#include "gtest/gtest.h"
#include "prometheus/metric_family.h"

namespace coppice {
namespace {

TEST(MetricsTest, NamesCarryPrefixAndUnits) {
  Metrics metrics;
  for (const prometheus::MetricFamily& family : metrics.registry().Collect()) {
    EXPECT_EQ(family.name.rfind("coppice_", 0), 0u) << family.name;
    EXPECT_FALSE(family.help.empty()) << family.name;
    const bool total = family.name.size() > 6 && family.name.ends_with("_total");
    EXPECT_EQ(total, family.type == prometheus::MetricType::Counter) << family.name;
    if (family.type == prometheus::MetricType::Histogram) {
      EXPECT_TRUE(family.name.ends_with("_seconds")) << family.name;
    }
  }
}

TEST(MetricsTest, StatesAndReasonsShareOneFamily) {
  Metrics metrics;
  std::map<std::string, size_t> series;
  for (const prometheus::MetricFamily& family : metrics.registry().Collect()) {
    EXPECT_TRUE(series.emplace(family.name, family.metric.size()).second) << family.name;
  }
  EXPECT_EQ(series["coppice_kv_blocks"], 3u);
  EXPECT_EQ(series["coppice_prompt_tokens_missed_total"], 8u);
  EXPECT_EQ(series["coppice_samples_finished_total"], 6u);
  EXPECT_EQ(series["coppice_train_step_phase_seconds"], 7u);
}

TEST(MetricsTest, UnknownPhaseCountsAsOther) {
  Metrics metrics;
  metrics.TrainPhaseSeconds("forward").Observe(1);
  metrics.TrainPhaseSeconds("reduce").Observe(1);
  EXPECT_NE(metrics.Serialize().find("coppice_train_step_phase_seconds_count{phase=\"other\"} 1"),
            std::string::npos);
}

}  // namespace
}  // namespace coppice
