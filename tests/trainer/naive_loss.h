// The losses once more, written plainly from their definitions as functions of the log-probs, for
// values and for finite differences. `base` stands for every detached log-prob: what is not to be
// differentiated reads it instead of `logprobs`.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "trainer/train_types.h"

namespace coppice {

struct NaiveSample {
  TrainSample sample;
  std::vector<double> advantages;  // [tokens]
  std::vector<double> logprobs;    // [tokens]
  std::vector<double> base;        // [tokens]
  std::vector<double> entropy;     // [tokens]

  double mask(size_t t) const { return sample.loss_mask.empty() ? 1 : sample.loss_mask[t]; }
  double old(size_t t, LossConfig::Kind kind) const {
    if (!sample.old_logprobs.empty()) return sample.old_logprobs[t];
    if (kind == LossConfig::Kind::kImportanceSampling && !sample.sampler_logprobs.empty()) {
      return sample.sampler_logprobs[t];
    }
    return base[t];
  }
  double mask_sum() const {
    double sum = 0;
    for (size_t t = 0; t < logprobs.size(); ++t) sum += mask(t);
    return sum;
  }
};

inline double NaivePolicyTerm(const LossConfig& c, const NaiveSample& s, size_t t) {
  const double A = s.advantages[t], l = s.logprobs[t];
  const double low = 1.0 - c.clip_low, high = 1.0 + c.clip_high;
  const auto token_ratio = [&](double logprob) {
    return std::exp(std::clamp(logprob - s.old(t, c.kind), -20.0, 20.0));
  };
  switch (c.kind) {
    case LossConfig::Kind::kCrossEntropy:
      return -A * l;
    case LossConfig::Kind::kImportanceSampling:
      return -token_ratio(l) * A;
    case LossConfig::Kind::kCispo:
      return -std::clamp(token_ratio(s.base[t]), low, high) * A * l;
    case LossConfig::Kind::kGspo: {
      double mean = 0;
      for (size_t u = 0; u < s.logprobs.size(); ++u) {
        mean += s.mask(u) * (s.base[u] - s.old(u, c.kind)) / s.mask_sum();
      }
      const double ratio = std::exp(std::min(l - s.base[t] + mean, 10.0));
      return std::max(-A * ratio, -A * std::clamp(ratio, low, high));
    }
    default:
      break;
  }
  const double ratio = token_ratio(l);
  const double clipped = std::max(-A * ratio, -A * std::clamp(ratio, low, high));
  if (A < 0 && c.clip_dual.has_value()) return std::min(clipped, -A * *c.clip_dual);
  return clipped;
}

inline double NaiveKl(const LossConfig& c, const NaiveSample& s, size_t t) {
  const double gap = s.logprobs[t] - s.sample.ref_logprobs[t];
  if (c.kl == LossConfig::KlEstimator::kK1) return gap;
  if (c.kl == LossConfig::KlEstimator::kK2) return 0.5 * gap * gap;
  const double d = std::clamp(-gap, -20.0, 20.0);
  return std::clamp(std::exp(d) - d - 1, -10.0, 10.0);
}

inline double NaiveTerm(const LossConfig& c, const NaiveSample& s, size_t t) {
  double term = NaivePolicyTerm(c, s, t);
  if (c.importance_cap.has_value()) {
    const double gap = s.old(t, c.kind) - s.sample.sampler_logprobs[t];
    term *= std::min<double>(std::exp(std::clamp(gap, -20.0, 20.0)), *c.importance_cap);
  }
  if (c.kl != LossConfig::KlEstimator::kNone) term += c.kl_coef * NaiveKl(c, s, t);
  return term - c.entropy_coef * s.entropy[t];
}

inline double NaiveLoss(const LossConfig& c, const std::vector<NaiveSample>& samples) {
  using Aggregation = LossConfig::Aggregation;
  const auto aggregation =
      c.kind == LossConfig::Kind::kGspo ? Aggregation::kSeqMeanTokenMean : c.aggregation;
  double tokens = 0, sequences = 0, sum = 0;
  for (const NaiveSample& s : samples) {
    tokens += s.mask_sum();
    sequences += s.mask_sum() > 0;
    double of_sample = 0;
    for (size_t t = 0; t < s.logprobs.size(); ++t) {
      if (s.mask(t) != 0) of_sample += s.mask(t) * NaiveTerm(c, s, t);
    }
    if (aggregation == Aggregation::kSeqMeanTokenMean && s.mask_sum() > 0) {
      of_sample /= s.mask_sum();
    }
    sum += s.sample.weight * of_sample;
  }
  if (aggregation == Aggregation::kSum) return sum;
  if (c.denominator.has_value()) return sum / *c.denominator;
  return sum / (aggregation == Aggregation::kTokenMean ? tokens : sequences);
}

}  // namespace coppice
