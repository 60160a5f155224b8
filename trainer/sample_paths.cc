#include "trainer/sample_paths.h"

#include <algorithm>
#include <utility>

namespace coppice {

void HeadGradientSums::Add(const std::vector<TargetRef>& refs, const SampleGradient& gradient) {
  for (size_t t = 0; t < refs.size(); ++t) {
    if (refs[t].target < 0) continue;
    d_logprobs_[refs[t].target] += gradient.d_logprobs[t];
    d_entropy_[refs[t].head_row] += gradient.d_entropy[t];
  }
}

HeadGradients HeadGradientSums::Round(bool with_entropy, double scale) const {
  const auto round = [scale](const std::vector<double>& values) {
    std::vector<float> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(),
                   [scale](double d) { return static_cast<float>(scale * d); });
    return rounded;
  };
  HeadGradients gradients{.d_logprobs = round(d_logprobs_)};
  if (with_entropy) gradients.d_entropy = round(d_entropy_);
  return gradients;
}

SamplePath GatherPath(absl::Span<const PathSource> sources, size_t i) {
  SamplePath path;
  for (const PathSource& source : sources) {
    const std::vector<TargetRef>& refs = source.tree.samples[source.first + i];
    path.logprobs.resize(refs.size());
    path.entropy.resize(refs.size());
    for (size_t t = 0; t < refs.size(); ++t) {
      if (refs[t].target < 0) continue;
      path.logprobs[t] = source.head.logprobs[refs[t].target];
      path.entropy[t] = source.head.entropy[refs[t].head_row];
    }
  }
  return path;
}

void EvaluateLoss(const ForwardBackwardRequest& request, const RequestPlan& plan,
                  const std::vector<int32_t>& samples, absl::Span<const PathSource> sources,
                  LossSums& sums, std::vector<SampleResult>& results) {
  for (size_t i = 0; i < samples.size(); ++i) {
    const int32_t s = samples[i];
    SamplePath path = GatherPath(sources, i);
    const SampleView view{.sample = *plan.samples[s],
                          .logprobs = path.logprobs,
                          .entropy = path.entropy,
                          .advantages = plan.advantages[s]};
    const SampleGradient gradient =
        EvaluateSample(request.loss, plan.counts, view, sums, results[s]);
    for (const PathSource& source : sources) {
      source.sums->Add(source.tree.samples[source.first + i], gradient);
    }
    if (request.return_logprobs) results[s].logprobs = std::move(path.logprobs);
  }
}

}  // namespace coppice
