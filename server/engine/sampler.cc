#include "server/engine/sampler.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"
#include "kernels/ops/params.h"
#include "server/engine/validate.h"

namespace coppice {
namespace {

// One row of logits [n, vocab] seen `copies` times, for a copy that repeats it.
TensorView Repeated(TensorView row, int64_t copies) {
  row.shape[0] = copies;
  row.stride[0] = 0;
  return row;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Sampler>> Sampler::Create(const Decoder& decoder,
                                                         int64_t max_draws) {
  std::unique_ptr<Sampler> sampler(new Sampler(decoder, max_draws));
  ASSIGN_OR_RETURN(
      sampler->logits_,
      decoder.ops().Allocate(max_draws * decoder.config().vocab * SizeOf(DType::kF32), "logits"));
  for (auto* values : {&sampler->raw_, &sampler->sampled_, &sampler->tempered_}) {
    values->resize(max_draws);
  }
  sampler->tokens_.resize(max_draws);
  sampler->top_ids_.resize(max_draws * kMaxTopLogprobs);
  sampler->top_values_.resize(max_draws * kMaxTopLogprobs);
  return sampler;
}

absl::Status Sampler::ComputeLogits(const Parameters& params, TensorView hidden,
                                    const std::vector<Draw>& draws) {
  const int64_t vocab = decoder_.config().vocab;
  const TensorView logits = View2D(logits_.data(), DType::kF32, max_draws_, vocab);
  const int64_t head_rows = hidden.dim(0);
  RETURN_IF_ERROR(decoder_.Logits(params, hidden, logits.Rows(0, head_rows)));
  row_of_.clear();
  int64_t next_copy = head_rows;
  for (size_t i = 0; i < draws.size();) {
    size_t end = i;
    while (end < draws.size() && draws[end].head_row == draws[i].head_row) ++end;
    const int64_t copies = static_cast<int64_t>(end - i) - 1;
    const int64_t row = draws[i].head_row;
    row_of_.push_back(row);
    for (int64_t c = 0; c < copies; ++c) row_of_.push_back(next_copy + c);
    if (copies > 0) {
      RETURN_IF_ERROR(decoder_.ops().Copy(Repeated(logits.Rows(row, row + 1), copies),
                                          logits.Rows(next_copy, next_copy + copies)));
    }
    next_copy += copies;
    i = end;
  }
  CHECK_EQ(next_copy, static_cast<int64_t>(draws.size()));
  return absl::OkStatus();
}

int32_t Sampler::FillRows(const std::vector<Draw>& draws) {
  rows_.assign(draws.size(), {});
  bias_ids_.clear();
  bias_values_.clear();
  int32_t width = 0;
  for (size_t i = 0; i < draws.size(); ++i) {
    const SamplingOptions& options = *draws[i].options;
    ops::SamplingRow& row = rows_[row_of_[i]];
    row = {.temperature = options.temperature,
           .top_k = options.top_k,
           .top_p = options.top_p,
           .min_p = options.min_p,
           .seed = draws[i].seed,
           .sample = static_cast<uint32_t>(draws[i].sample),
           .position = static_cast<uint32_t>(draws[i].position),
           .bias_begin = static_cast<int32_t>(bias_ids_.size())};
    for (const auto& [id, bias] : options.logit_bias) {
      bias_ids_.push_back(id);
      bias_values_.push_back(bias);
    }
    row.bias_end = static_cast<int32_t>(bias_ids_.size());
    width = std::max(width, draws[i].top_logprobs);
  }
  return width;
}

DrawnToken Sampler::Collect(const Draw& draw, int64_t row, int32_t width) const {
  DrawnToken drawn{.token = tokens_[row],
                   .raw_logprob = raw_[row],
                   .sampled_logprob = sampled_[row],
                   .tempered_logprob = tempered_[row]};
  const int64_t begin = row * width;
  drawn.top.token_ids.assign(&top_ids_[begin], &top_ids_[begin] + draw.top_logprobs);
  drawn.top.logprobs.assign(&top_values_[begin], &top_values_[begin] + draw.top_logprobs);
  return drawn;
}

absl::StatusOr<std::vector<DrawnToken>> Sampler::Run(const Parameters& params, TensorView hidden,
                                                     const std::vector<Draw>& draws) {
  CHECK_LE(static_cast<int64_t>(draws.size()), max_draws_);
  RETURN_IF_ERROR(ComputeLogits(params, hidden, draws));
  const int32_t width = FillRows(draws);
  const int64_t n = static_cast<int64_t>(draws.size());
  RETURN_IF_ERROR(decoder_.ops().Sample(
      {.logits = View2D(logits_.data(), DType::kF32, n, decoder_.config().vocab),
       .rows = rows_.data(),
       .bias_ids = bias_ids_.data(),
       .bias_values = bias_values_.data(),
       .top_logprobs = width,
       .tokens = tokens_.data(),
       .raw_logprobs = raw_.data(),
       .sampled_logprobs = sampled_.data(),
       .tempered_logprobs = tempered_.data(),
       .top_ids = top_ids_.data(),
       .top_values = top_values_.data()}));
  std::vector<DrawnToken> drawn;
  for (size_t i = 0; i < draws.size(); ++i) drawn.push_back(Collect(draws[i], row_of_[i], width));
  return drawn;
}

}  // namespace coppice
