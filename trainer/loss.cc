#include "trainer/loss.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace coppice {
namespace {

constexpr double kMaxLogRatio = 20;
constexpr double kMaxSequenceLogRatio = 10;
constexpr double kMaxK3 = 10;

// The policy term of one token and its derivative by the token's log-prob.
struct TokenTerm {
  double loss = 0;
  double d_logprob = 0;
  double ratio = 1;
  bool clip_low = false, clip_high = false, clip_dual = false;
};

// A ratio and whether the gradient flows through it (not where its logarithm was clamped).
struct Ratio {
  double value = 1;
  bool live = true;
};

Ratio TokenRatio(double log_ratio) {
  const double clamped = std::clamp(log_ratio, -kMaxLogRatio, kMaxLogRatio);
  return {std::exp(clamped), clamped == log_ratio};
}

Ratio SequenceRatio(double mean_log_ratio) {
  const double clamped = std::min(mean_log_ratio, kMaxSequenceLogRatio);
  return {std::exp(clamped), clamped == mean_log_ratio};
}

// max(-r A, -clip(r) A), and for A < 0 at most -dual A.
TokenTerm ClippedTerm(const LossConfig& config, Ratio ratio, double advantage, bool allow_dual) {
  const double low = 1.0 - config.clip_low, high = 1.0 + config.clip_high;
  const double r = ratio.value;
  const double free = -r * advantage;
  const double clipped = -std::clamp(r, low, high) * advantage;
  TokenTerm term{.loss = std::max(free, clipped), .ratio = r};
  if (clipped > free) {
    term.clip_low = r < low;
    term.clip_high = r > high;
  } else if (ratio.live) {
    term.d_logprob = free;  // dr/dl = r
  }
  if (allow_dual && config.clip_dual.has_value() && advantage < 0) {
    const double bound = -*config.clip_dual * advantage;
    if (term.loss > bound) {
      term.loss = bound;
      term.d_logprob = 0;
      term.clip_dual = true;
    }
  }
  return term;
}

TokenTerm CispoTerm(const LossConfig& config, Ratio ratio, double advantage, double logprob) {
  const double low = 1.0 - config.clip_low, high = 1.0 + config.clip_high;
  const double weight = std::clamp(ratio.value, low, high);
  return {.loss = -weight * advantage * logprob,
          .d_logprob = -weight * advantage,
          .ratio = ratio.value,
          .clip_low = ratio.value<low, .clip_high = ratio.value> high};
}

TokenTerm PolicyTerm(const LossConfig& config, Ratio ratio, double advantage, double logprob) {
  switch (config.kind) {
    case LossConfig::Kind::kCrossEntropy:
      return {.loss = -advantage * logprob, .d_logprob = -advantage, .ratio = ratio.value};
    case LossConfig::Kind::kImportanceSampling:
      return {.loss = -ratio.value * advantage,
              .d_logprob = ratio.live ? -ratio.value * advantage : 0,
              .ratio = ratio.value};
    case LossConfig::Kind::kCispo:
      return CispoTerm(config, ratio, advantage, logprob);
    case LossConfig::Kind::kGspo:
      return ClippedTerm(config, ratio, advantage, /*allow_dual=*/false);
    case LossConfig::Kind::kPpo:
    case LossConfig::Kind::kGrpo:
    case LossConfig::Kind::kDapo:
    case LossConfig::Kind::kDrGrpo:
      break;
  }
  return ClippedTerm(config, ratio, advantage, /*allow_dual=*/true);
}

struct KlTerm {
  double value = 0;
  double d_logprob = 0;
};

KlTerm KlEstimate(LossConfig::KlEstimator estimator, double logprob, double ref_logprob) {
  const double gap = logprob - ref_logprob;
  switch (estimator) {
    case LossConfig::KlEstimator::kNone:
      return {};
    case LossConfig::KlEstimator::kK1:
      return {gap, 1};
    case LossConfig::KlEstimator::kK2:
      return {gap * gap / 2, gap};
    case LossConfig::KlEstimator::kK3:
      break;
  }
  const double d = std::clamp(-gap, -kMaxLogRatio, kMaxLogRatio);
  const double value = std::exp(d) - d - 1;
  const bool live = d == -gap && value <= kMaxK3;
  return {std::min(value, kMaxK3), live ? 1 - std::exp(d) : 0};
}

double MaskAt(const TrainSample& sample, size_t t) {
  return sample.loss_mask.empty() ? 1.0 : sample.loss_mask[t];
}

double MaskSum(const TrainSample& sample) {
  double sum = 0;
  for (size_t t = 0; t < sample.tokens.size(); ++t) sum += MaskAt(sample, t);
  return sum;
}

// The log-probs that the ratio compares with; empty = the policy's own, detached.
absl::Span<const float> OldLogprobs(const LossConfig& config, const TrainSample& sample) {
  if (!sample.old_logprobs.empty()) return sample.old_logprobs;
  if (config.kind == LossConfig::Kind::kImportanceSampling) return sample.sampler_logprobs;
  return {};
}

double MeanLogRatio(const SampleView& view, absl::Span<const float> old) {
  if (old.empty()) return 0;
  double sum = 0, tokens = 0;
  for (size_t t = 0; t < view.logprobs.size(); ++t) {
    const double mask = MaskAt(view.sample, t);
    if (mask == 0) continue;
    sum += mask * (static_cast<double>(view.logprobs[t]) - old[t]);
    tokens += mask;
  }
  return tokens > 0 ? sum / tokens : 0;
}

// What multiplies mask * term of each token of the sample.
double TokenScale(const LossConfig& config, const LossCounts& counts, const TrainSample& sample,
                  double mask_sum) {
  const double weight = sample.weight;
  const bool gspo = config.kind == LossConfig::Kind::kGspo;
  const auto aggregation = gspo ? LossConfig::Aggregation::kSeqMeanTokenMean : config.aggregation;
  switch (aggregation) {
    case LossConfig::Aggregation::kTokenMean:
      return weight / config.denominator.value_or(counts.tokens);
    case LossConfig::Aggregation::kSeqMeanTokenMean:
      return weight / (config.denominator.value_or(counts.sequences) * mask_sum);
    case LossConfig::Aggregation::kSeqMeanTokenSum:
      return weight / config.denominator.value_or(counts.sequences);
    case LossConfig::Aggregation::kConstant:
      return weight / config.denominator.value_or(1);
    case LossConfig::Aggregation::kSum:
      break;
  }
  return weight;
}

// One sample on its way through the loss: what is constant over its tokens.
class SampleEvaluation {
 public:
  SampleEvaluation(const LossConfig& config, const LossCounts& counts, const SampleView& view,
                   double mask_sum)
      : config_(config),
        view_(view),
        old_(OldLogprobs(config, view.sample)),
        scale_(TokenScale(config, counts, view.sample, mask_sum)),
        sequence_ratio_(SequenceRatio(MeanLogRatio(view, old_))) {}

  void Token(size_t t, double mask, LossSums& sums, SampleGradient& gradient,
             double& kl_sum) const {
    const double logprob = view_.logprobs[t];
    const double old = old_.empty() ? logprob : static_cast<double>(old_[t]);
    const double advantage = view_.advantages[view_.advantages.size() == 1 ? 0 : t];
    const bool gspo = config_.kind == LossConfig::Kind::kGspo;
    const Ratio ratio = gspo ? sequence_ratio_ : TokenRatio(logprob - old);
    const TokenTerm term = PolicyTerm(config_, ratio, advantage, logprob);
    const double importance = Importance(t, old);
    const KlTerm kl = config_.kl == LossConfig::KlEstimator::kNone
                          ? KlTerm{}
                          : KlEstimate(config_.kl, logprob, view_.sample.ref_logprobs[t]);

    const double scale = scale_ * mask;
    gradient.d_logprobs[t] = scale * (importance * term.d_logprob + config_.kl_coef * kl.d_logprob);
    gradient.d_entropy[t] = -scale * config_.entropy_coef;
    sums.policy_loss += scale * importance * term.loss;
    sums.kl_loss += scale * config_.kl_coef * kl.value;
    sums.entropy_bonus += scale * config_.entropy_coef * view_.entropy[t];
    kl_sum += mask * kl.value;
    CountRatio(term, mask, sums);
    sums.tokens += mask;
    sums.entropy += mask * view_.entropy[t];
    sums.kl += mask * kl.value;
    sums.advantage += mask * advantage;
    sums.log_ratio += mask * (old - logprob);
    sums.importance += mask * importance;
    CountGap(t, logprob, mask, sums);
  }

 private:
  // min(exp(l_old - l_sampler), cap); 1 when off.
  double Importance(size_t t, double old) const {
    if (!config_.importance_cap.has_value()) return 1;
    const double ratio = TokenRatio(old - view_.sample.sampler_logprobs[t]).value;
    return std::min(ratio, static_cast<double>(*config_.importance_cap));
  }

  static void CountRatio(const TokenTerm& term, double mask, LossSums& sums) {
    const bool first = sums.tokens == 0;
    sums.ratio += mask * term.ratio;
    sums.ratio_min = first ? term.ratio : std::min(sums.ratio_min, term.ratio);
    sums.ratio_max = first ? term.ratio : std::max(sums.ratio_max, term.ratio);
    if (term.clip_low) sums.clip_low += mask;
    if (term.clip_high) sums.clip_high += mask;
    if (term.clip_dual) sums.clip_dual += mask;
  }

  void CountGap(size_t t, double logprob, double mask, LossSums& sums) const {
    if (view_.sample.sampler_logprobs.empty()) return;
    const double gap = std::abs(logprob - view_.sample.sampler_logprobs[t]);
    sums.gap_tokens += mask;
    sums.gap += mask * gap;
    sums.gap_max = std::max(sums.gap_max, gap);
  }

  const LossConfig& config_;
  const SampleView& view_;
  absl::Span<const float> old_;
  double scale_;
  Ratio sequence_ratio_;
};

}  // namespace

void LossCounts::Add(const TrainSample& sample) {
  const double mask_sum = MaskSum(sample);
  tokens += mask_sum;
  if (mask_sum > 0) sequences += 1;
}

SampleGradient EvaluateSample(const LossConfig& config, const LossCounts& counts,
                              const SampleView& view, LossSums& sums, SampleResult& result) {
  const size_t num_tokens = view.sample.tokens.size();
  SampleGradient gradient{.d_logprobs = std::vector<double>(num_tokens),
                          .d_entropy = std::vector<double>(num_tokens)};
  sums.has_kl |= config.kl != LossConfig::KlEstimator::kNone;
  sums.has_importance |= config.importance_cap.has_value();
  if (view.sample.reward.has_value()) {
    sums.rewards += 1;
    sums.reward += *view.sample.reward;
  }
  const double mask_sum = MaskSum(view.sample);
  if (mask_sum == 0) return gradient;

  const SampleEvaluation evaluation(config, counts, view, mask_sum);
  double entropy = 0, kl = 0;
  for (size_t t = 0; t < num_tokens; ++t) {
    const double mask = MaskAt(view.sample, t);
    if (mask == 0) continue;
    evaluation.Token(t, mask, sums, gradient, kl);
    entropy += mask * view.entropy[t];
  }
  result.entropy = entropy / mask_sum;
  result.kl = kl / mask_sum;
  return gradient;
}

double LargestCoefficient(const LossConfig& config, const LossCounts& counts,
                          const TrainSample& sample, absl::Span<const double> advantages) {
  const double mask_sum = MaskSum(sample);
  if (mask_sum == 0) return 0;
  const double scale = std::abs(TokenScale(config, counts, sample, mask_sum));
  double largest = 0;
  for (size_t t = 0; t < sample.tokens.size(); ++t) {
    const double advantage = std::abs(advantages[advantages.size() == 1 ? 0 : t]);
    const double term = std::max(advantage + std::abs(config.kl_coef),
                                 static_cast<double>(std::abs(config.entropy_coef)));
    largest = std::max(largest, scale * MaskAt(sample, t) * term);
  }
  return largest;
}

std::map<std::string, double> LossSums::Metrics() const {
  std::map<std::string, double> metrics;
  const auto put = [&metrics](const char* name, double value) {
    if (std::isfinite(value)) metrics[name] = value;
  };
  put("pg_loss", policy_loss);
  put("entropy_bonus", entropy_bonus);
  if (has_kl) put("kl_loss", kl_loss);
  if (rewards > 0) put("reward_mean", reward / rewards);
  if (gap_tokens > 0) {
    put("logprob_gap_mean", gap / gap_tokens);
    put("logprob_gap_max", gap_max);
  }
  if (tokens == 0) return metrics;
  for (const auto& [name, sum] : {std::pair("entropy", entropy),
                                  {"advantage_mean", advantage},
                                  {"approx_kl", log_ratio},
                                  {"ratio_mean", ratio},
                                  {"clip_low", clip_low},
                                  {"clip_high", clip_high},
                                  {"clip_dual", clip_dual}}) {
    put(name, sum / tokens);
  }
  put("ratio_min", ratio_min);
  put("ratio_max", ratio_max);
  if (has_kl) put("kl", kl / tokens);
  if (has_importance) put("importance_mean", importance / tokens);
  return metrics;
}

}  // namespace coppice
