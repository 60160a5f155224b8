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
  ASSIGN_OR_RETURN(sampler->drawn_,
                   decoder.ops().Allocate(max_draws * SizeOf(DType::kI32), "drawn tokens"));
  return sampler;
}

absl::StatusOr<std::vector<int64_t>> Sampler::ComputeLogits(const Parameters& params,
                                                            TensorView hidden,
                                                            const std::vector<Draw>& draws) {
  const int64_t vocab = decoder_.config().vocab;
  const TensorView logits = View2D(logits_.data(), DType::kF32, max_draws_, vocab);
  const int64_t head_rows = hidden.dim(0);
  RETURN_IF_ERROR(decoder_.Logits(params, hidden, logits.Rows(0, head_rows)));
  std::vector<int64_t> row_of;
  int64_t next_copy = head_rows;
  for (size_t i = 0; i < draws.size();) {
    size_t end = i;
    while (end < draws.size() && draws[end].head_row == draws[i].head_row) ++end;
    const int64_t copies = static_cast<int64_t>(end - i) - 1;
    const int64_t row = draws[i].head_row;
    row_of.push_back(row);
    for (int64_t c = 0; c < copies; ++c) row_of.push_back(next_copy + c);
    if (copies > 0) {
      RETURN_IF_ERROR(decoder_.ops().Copy(Repeated(logits.Rows(row, row + 1), copies),
                                          logits.Rows(next_copy, next_copy + copies)));
    }
    next_copy += copies;
    i = end;
  }
  CHECK_EQ(next_copy, static_cast<int64_t>(draws.size()));
  return row_of;
}

void Sampler::FillRows(const std::vector<Draw>& draws, const std::vector<int64_t>& row_of) {
  rows_.assign(draws.size(), {});
  bias_ids_.clear();
  bias_values_.clear();
  for (size_t i = 0; i < draws.size(); ++i) {
    const SamplingOptions& options = *draws[i].options;
    ops::SamplingRow& row = rows_[row_of[i]];
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
  }
}

absl::StatusOr<std::unique_ptr<PendingDraws>> Sampler::Start(const Parameters& params,
                                                             TensorView hidden,
                                                             const std::vector<Draw>& draws) {
  CHECK_LE(static_cast<int64_t>(draws.size()), max_draws_);
  auto result = std::make_unique<PendingDraws>();
  ASSIGN_OR_RETURN(result->row_of_, ComputeLogits(params, hidden, draws));
  FillRows(draws, result->row_of_);
  const int64_t n = static_cast<int64_t>(draws.size());
  for (const Draw& draw : draws) {
    result->width_.push_back(draw.top_logprobs);
    result->max_width_ = std::max(result->max_width_, draw.top_logprobs);
  }
  result->tokens_.resize(n);
  for (auto* values : {&result->raw_, &result->sampled_, &result->tempered_}) values->resize(n);
  result->top_ids_.resize(n * result->max_width_);
  result->top_values_.resize(n * result->max_width_);
  ASSIGN_OR_RETURN(result->pending_,
                   decoder_.ops().StartSample(
                       {.logits = View2D(logits_.data(), DType::kF32, n, decoder_.config().vocab),
                        .rows = rows_.data(),
                        .bias_ids = bias_ids_.data(),
                        .bias_values = bias_values_.data(),
                        .top_logprobs = result->max_width_,
                        .drawn = drawn().Rows(0, n),
                        .tokens = result->tokens_.data(),
                        .raw_logprobs = result->raw_.data(),
                        .sampled_logprobs = result->sampled_.data(),
                        .tempered_logprobs = result->tempered_.data(),
                        .top_ids = result->top_ids_.data(),
                        .top_values = result->top_values_.data()}));
  return result;
}

absl::StatusOr<std::vector<DrawnToken>> PendingDraws::Wait() {
  const absl::Status status = pending_->Wait();
  if (!absl::IsInvalidArgument(status)) RETURN_IF_ERROR(status);  // that is of single rows
  std::vector<DrawnToken> drawn;
  for (size_t i = 0; i < row_of_.size(); ++i) {
    const int64_t row = row_of_[i], begin = row * max_width_;
    DrawnToken& token = drawn.emplace_back(DrawnToken{.token = tokens_[row],
                                                      .raw_logprob = raw_[row],
                                                      .sampled_logprob = sampled_[row],
                                                      .tempered_logprob = tempered_[row]});
    const auto ids = top_ids_.begin() + begin;
    const auto values = top_values_.begin() + begin;
    token.top.token_ids.assign(ids, ids + width_[i]);
    token.top.logprobs.assign(values, values + width_[i]);
  }
  return drawn;
}

}  // namespace coppice
