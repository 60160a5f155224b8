#include "trainer/advantages.h"

#include <cmath>

#include "kernels/base/check.h"

namespace coppice {
namespace {

constexpr double kStdEpsilon = 1e-6;

double Mean(absl::Span<const double> values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / static_cast<double>(values.size());
}

double UnbiasedStd(absl::Span<const double> values, double mean) {
  double sum = 0;
  for (const double v : values) sum += (v - mean) * (v - mean);
  return std::sqrt(sum / static_cast<double>(values.size() - 1));
}

}  // namespace

std::vector<double> GroupAdvantages(LossConfig::Advantage kind, absl::Span<const double> rewards) {
  CHECK(kind != LossConfig::Advantage::kGiven);
  if (rewards.size() < 2) return std::vector<double>(rewards.size(), 0.0);
  const double n = static_cast<double>(rewards.size());
  const double mean = Mean(rewards);
  double scale = 1;
  if (kind == LossConfig::Advantage::kGroupNormalized) {
    scale = 1 / (UnbiasedStd(rewards, mean) + kStdEpsilon);
  } else if (kind == LossConfig::Advantage::kLeaveOneOut) {
    scale = n / (n - 1);  // r - (n mean - r) / (n - 1)
  }
  std::vector<double> advantages;
  for (const double reward : rewards) advantages.push_back((reward - mean) * scale);
  return advantages;
}

std::vector<std::vector<double>> SampleAdvantages(const LossConfig& config,
                                                  const TrainGroup& group) {
  std::vector<std::vector<double>> advantages;
  if (config.advantage == LossConfig::Advantage::kGiven) {
    for (const TrainSample& sample : group.samples) {
      advantages.emplace_back(sample.advantages.begin(), sample.advantages.end());
      if (advantages.back().empty()) advantages.back().push_back(1.0);
    }
    return advantages;
  }
  std::vector<double> rewards;
  for (const TrainSample& sample : group.samples) rewards.push_back(*sample.reward);
  for (const double a : GroupAdvantages(config.advantage, rewards)) advantages.push_back({a});
  return advantages;
}

}  // namespace coppice
