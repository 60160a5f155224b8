// One token per row of logits. Filters apply in the order logit bias, temperature, top-k, top-p,
// min-p; the token is the first (by id) whose cumulative probability exceeds a counter-based
// uniform number (base/rng.h), so that it depends on its own row, seed, sample and position only.
//   top-k: the k largest probabilities; ties at the edge go to lower ids.
//   top-p: the shortest prefix, by descending probability, whose mass among the top-k reaches p
//   (Holtzman et al. 2020). min-p: probabilities of at least min_p times the largest (Nguyen et al.
//   2024).
// Cost: three passes over the row without top-k and top-p; with them, a selection among its tokens
// as well.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/rng.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

using ops::SampleParams;
using ops::SamplingRow;

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

double SumInOrder(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

// log sum exp(logits / temperature), exact for tiny temperatures; NaN or infinite if nothing can be
// drawn. `scratch` [vocab] is overwritten.
double LogSumExp(const float* logits, int64_t vocab, float temperature, float* scratch) {
  const float max = SimdKernels().max(logits, vocab);
  SimdKernels().exp_shifted(logits, max, temperature, scratch, vocab);
  return double{max} / temperature + std::log(SumInOrder(scratch, vocab));
}

// The largest raw log-probs, descending; ties by lower id.
void WriteTopLogprobs(const float* logits, int64_t vocab, double lse, int32_t count, int32_t* ids,
                      float* values) {
  std::vector<int32_t> order(vocab);
  for (int64_t i = 0; i < vocab; ++i) order[i] = static_cast<int32_t>(i);
  const auto larger = [logits](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  std::partial_sort(order.begin(), order.begin() + std::min<int64_t>(count, vocab), order.end(),
                    larger);
  for (int32_t i = 0; i < count; ++i) {
    ids[i] = i < vocab ? order[i] : -1;
    values[i] = i < vocab ? static_cast<float>(logits[order[i]] - lse) : kMinusInf;
  }
}

int32_t ArgMax(const float* x, int64_t n) {
  return static_cast<int32_t>(std::max_element(x, x + n) - x);
}

// Length of the shortest prefix, by descending weight, that holds at least `top_p` of the weight of
// order[0, n); that prefix is sorted. Sorts growing pieces, as a nucleus is mostly a few hundred
// tokens.
template <typename Larger>
size_t SortNucleus(std::vector<int32_t>& order, size_t n, const float* weights, float top_p,
                   const Larger& larger) {
  double mass = 0;
  for (size_t i = 0; i < n; ++i) mass += weights[order[i]];
  double reached = 0;
  size_t length = 0, sorted = 0;
  while (length < n && reached < top_p * mass) {
    if (length == sorted) {
      sorted = std::min(n, std::max<size_t>(256, 4 * sorted));
      std::nth_element(order.begin() + length, order.begin() + sorted, order.begin() + n, larger);
      std::sort(order.begin() + length, order.begin() + sorted, larger);
    }
    reached += weights[order[length++]];
  }
  return std::max<size_t>(length, 1);
}

// Zeroes the weights outside the top-k and the nucleus.
void KeepLargest(const SamplingRow& row, float* weights, int64_t vocab) {
  std::vector<int32_t> order;
  order.reserve(vocab);
  for (int64_t i = 0; i < vocab; ++i) {
    if (weights[i] > 0) order.push_back(static_cast<int32_t>(i));
  }
  const auto larger = [weights](int32_t a, int32_t b) {
    return weights[a] != weights[b] ? weights[a] > weights[b] : a < b;
  };
  size_t kept = order.size();
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < kept) {
    kept = row.top_k;
    std::nth_element(order.begin(), order.begin() + kept, order.end(), larger);
  }
  if (row.top_p < 1) kept = SortNucleus(order, kept, weights, row.top_p, larger);
  for (size_t i = kept; i < order.size(); ++i) weights[order[i]] = 0;
}

// Zeroes the weights that the filters drop. `weights` are exp((logit - max) / temperature): the
// largest is 1.
void ApplyFilters(const SamplingRow& row, float* weights, int64_t vocab) {
  if (row.top_k > 0 || row.top_p < 1) KeepLargest(row, weights, vocab);
  if (row.min_p > 0) {
    for (int64_t i = 0; i < vocab; ++i) weights[i] = weights[i] >= row.min_p ? weights[i] : 0.0f;
  }
}

// First token whose cumulative weight exceeds u * total.
int32_t Draw(const float* weights, int64_t vocab, double total, float u) {
  const double threshold = u * total;
  double cumulative = 0;
  int32_t last = 0;  // rounding may leave the threshold above the last sum
  for (int64_t i = 0; i < vocab; ++i) {
    if (weights[i] == 0) continue;
    cumulative += weights[i];
    last = static_cast<int32_t>(i);
    if (cumulative > threshold) break;
  }
  return last;
}

// Scores of one row: raw logits plus biases.
void ApplyBias(const SampleParams& p, const SamplingRow& row, float* scores) {
  for (int32_t b = row.bias_begin; b < row.bias_end; ++b) {
    scores[p.bias_ids[b]] += p.bias_values[b];
  }
}

// Draws the token of row i with `scores` [vocab] as scratch. False if there is nothing to draw
// from: every score is -inf, or one is NaN or +inf.
bool SampleRow(const SampleParams& p, int64_t i, float* scores) {
  const SamplingRow& row = p.rows[i];
  const int64_t vocab = p.logits.dim(1);
  const float* logits = p.logits.f32() + i * p.logits.stride[0];
  const double raw_lse = LogSumExp(logits, vocab, 1.0f, scores);
  if (!std::isfinite(raw_lse)) return false;
  if (p.top_logprobs > 0) {
    WriteTopLogprobs(logits, vocab, raw_lse, p.top_logprobs, p.top_ids + i * p.top_logprobs,
                     p.top_values + i * p.top_logprobs);
  }
  const float temperature = row.temperature > 0 ? row.temperature : 1.0f;
  const double tempered_lse =
      temperature == 1.0f ? raw_lse : LogSumExp(logits, vocab, temperature, scores);
  std::copy(logits, logits + vocab, scores);
  ApplyBias(p, row, scores);
  const float max = SimdKernels().max(scores, vocab);
  if (!std::isfinite(max)) return false;
  if (row.temperature == 0) {
    p.tokens[i] = ArgMax(scores, vocab);
    p.sampled_logprobs[i] = 0;
  } else {
    SimdKernels().exp_shifted(scores, max, row.temperature, scores, vocab);
    ApplyFilters(row, scores, vocab);
    const double total = SumInOrder(scores, vocab);
    if (!std::isfinite(total)) return false;
    p.tokens[i] = Draw(scores, vocab, total, SamplingUniform(row.seed, row.sample, row.position));
    p.sampled_logprobs[i] = static_cast<float>(std::log(scores[p.tokens[i]] / total));
  }
  const double logit = logits[p.tokens[i]];
  p.raw_logprobs[i] = static_cast<float>(logit - raw_lse);
  if (p.tempered_logprobs != nullptr) {
    p.tempered_logprobs[i] = static_cast<float>(logit / temperature - tempered_lse);
  }
  return true;
}

absl::Status CheckRow(const SampleParams& p, const SamplingRow& row) {
  const int64_t vocab = p.logits.dim(1);
  const auto bad = [](absl::string_view what, absl::string_view want, float got) {
    return absl::InvalidArgumentError(
        absl::StrCat("sample: ", what, ": want ", want, ", got ", got, "; fix the request"));
  };
  if (!(row.temperature >= 0 && std::isfinite(row.temperature))) {
    return bad("temperature", "a finite number of at least 0", row.temperature);
  }
  if (!(row.top_p > 0 && row.top_p <= 1)) return bad("top_p", "(0, 1]", row.top_p);
  if (!(row.min_p >= 0 && row.min_p < 1)) return bad("min_p", "[0, 1)", row.min_p);
  for (int32_t b = row.bias_begin; b < row.bias_end; ++b) {
    if (p.bias_ids[b] < 0 || p.bias_ids[b] >= vocab) {
      return bad("logit bias token", "an id of the vocabulary", static_cast<float>(p.bias_ids[b]));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSample(const SampleParams& p) {
  const int64_t n = p.logits.dim(0), vocab = p.logits.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("sample")
                      .Tensor("logits", p.logits, DType::kF32, {n, vocab})
                      .Optional("drawn", p.drawn, DType::kI32, {n})
                      .That(vocab > 0, "vocab", "at least 1", vocab)
                      .That(p.top_logprobs >= 0 && p.top_logprobs <= 20, "top_logprobs", "[0, 20]",
                            p.top_logprobs)
                      .status());
  for (int64_t i = 0; i < n; ++i) RETURN_IF_ERROR(CheckRow(p, p.rows[i]));
  return absl::OkStatus();
}

// Draws at once into memory of its own and hands the results out when they are waited for, as a
// device would.
class CpuPendingSample final : public ops::PendingSample {
 public:
  explicit CpuPendingSample(const SampleParams& p) : params_(p), n_(p.logits.dim(0)) {
    const int64_t top = n_ * p.top_logprobs;
    for (auto* values : {&raw_, &sampled_, &tempered_}) values->resize(n_);
    tokens_.resize(n_);
    top_ids_.resize(top);
    top_values_.resize(top);
  }

  void Run(Context& context) {
    SampleParams p = params_;
    p.tokens = tokens_.data();
    p.raw_logprobs = raw_.data();
    p.sampled_logprobs = sampled_.data();
    p.tempered_logprobs = tempered_.data();
    p.top_ids = top_ids_.data();
    p.top_values = top_values_.data();
    const int64_t vocab = p.logits.dim(1);
    float* scores = context.Scratch(context.num_threads() * vocab);
    drawn_.resize(n_);
    ParallelFor(context, n_, [&](int64_t i, int thread) {
      drawn_[i] = SampleRow(p, i, scores + thread * vocab);
    });
    if (p.drawn.present()) std::copy(tokens_.begin(), tokens_.end(), p.drawn.i32());
  }

  absl::Status Wait() override {
    const SampleParams& p = params_;
    std::copy(tokens_.begin(), tokens_.end(), p.tokens);
    std::copy(raw_.begin(), raw_.end(), p.raw_logprobs);
    std::copy(sampled_.begin(), sampled_.end(), p.sampled_logprobs);
    if (p.tempered_logprobs != nullptr) {
      std::copy(tempered_.begin(), tempered_.end(), p.tempered_logprobs);
    }
    std::copy(top_ids_.begin(), top_ids_.end(), p.top_ids);
    std::copy(top_values_.begin(), top_values_.end(), p.top_values);
    absl::Status status;
    for (int64_t i = 0; i < n_; ++i) {
      if (drawn_[i]) continue;
      p.tokens[i] = -1;
      status.Update(absl::InvalidArgumentError(
          absl::StrCat("sample: logits of row ", i,
                       ": want finite values, got NaN, +inf or only -inf; check the weights and "
                       "the logit bias")));
    }
    return status;
  }

 private:
  const SampleParams params_;
  const int64_t n_;
  std::vector<uint8_t> drawn_;
  std::vector<int32_t> tokens_, top_ids_;
  std::vector<float> raw_, sampled_, tempered_, top_values_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ops::PendingSample>> StartSample(Context& context,
                                                                const SampleParams& p) {
  RETURN_IF_ERROR(CheckSample(p));
  auto pending = std::make_unique<CpuPendingSample>(p);
  pending->Run(context);
  return pending;
}

}  // namespace coppice::cpu
