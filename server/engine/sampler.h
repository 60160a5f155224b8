// Sampler: hidden rows of a step -> drawn tokens with their log-probs. Several draws may share a
// row (the samples of a group all draw their first token from the prompt's last row). The draw
// depends on (seed, sample, position) alone, not on the batch. Owner and thread: Generator, on the
// engine thread. Its buffers are allocated once.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/device.h"
#include "kernels/model/decoder.h"
#include "server/engine/request.h"

namespace coppice {

struct Draw {
  const SamplingOptions* options = nullptr;
  uint64_t seed = 0;
  int32_t sample = 0;
  int64_t position = 0;  // of the token drawn
  int32_t head_row = 0;  // ascending over a step; every row of `hidden` has at least one draw
  int32_t top_logprobs = 0;
};

struct DrawnToken {
  int32_t token = 0;
  float raw_logprob = 0;  // log-softmax of the raw logits
  float sampled_logprob =
      0;  // of the distribution drawn from: after bias, temperature and truncation; 0 when greedy
  float tempered_logprob =
      0;            // at the sampling temperature (1 when greedy), before bias and truncation
  TopLogprobs top;  // by raw log-prob
};

class Sampler {
 public:
  // Borrows the decoder.
  static absl::StatusOr<std::unique_ptr<Sampler>> Create(const Decoder& decoder, int64_t max_draws);

  // hidden: [head_rows, hidden] f. Results in order of `draws`. REQUIRES: draws.size() <=
  // max_draws.
  absl::StatusOr<std::vector<DrawnToken>> Run(const Parameters& params, TensorView hidden,
                                              const std::vector<Draw>& draws);

 private:
  Sampler(const Decoder& decoder, int64_t max_draws) : decoder_(decoder), max_draws_(max_draws) {}

  // logits_ rows: one per head row, then copies for further draws of a row; fills row_of_.
  absl::Status ComputeLogits(const Parameters& params, TensorView hidden,
                             const std::vector<Draw>& draws);
  // Rows and biases in order of the logits rows. Returns the widest top_logprobs.
  int32_t FillRows(const std::vector<Draw>& draws);
  DrawnToken Collect(const Draw& draw, int64_t row, int32_t width) const;

  const Decoder& decoder_;
  const int64_t max_draws_;
  DeviceBuffer logits_;
  std::vector<int64_t> row_of_;  // [draws] row of logits_
  std::vector<ops::SamplingRow> rows_;
  std::vector<int32_t> bias_ids_;
  std::vector<float> bias_values_;
  std::vector<int32_t> tokens_, top_ids_;
  std::vector<float> raw_, sampled_, tempered_, top_values_;
};

}  // namespace coppice
