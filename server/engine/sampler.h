// Sampler: hidden rows of a step -> drawn tokens with their log-probs. Several draws may share a
// row (the samples of a group all draw their first token from the prompt's last row). The draw
// depends on (seed, sample, position) alone, not on the batch. Owner and thread: Generator, on the
// engine thread. Its device buffers are allocated once.
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
  int32_t token = 0;      // -1: its logits are not finite, there is nothing to draw from
  float raw_logprob = 0;  // log-softmax of the raw logits
  float sampled_logprob =
      0;  // of the distribution drawn from: after bias, temperature and truncation; 0 when greedy
  float tempered_logprob =
      0;            // at the sampling temperature (1 when greedy), before bias and truncation
  TopLogprobs top;  // by raw log-prob
};

// Draws of one step that are on their way.
class PendingDraws {
 public:
  // Blocks until they are known; in order of the draws. Call it once.
  absl::StatusOr<std::vector<DrawnToken>> Wait();

 private:
  friend class Sampler;
  std::vector<int64_t> row_of_;  // [draws] row of the logits
  std::vector<int32_t> width_;   // [draws] top log-probs asked for
  int32_t max_width_ = 0;
  std::vector<int32_t> tokens_, top_ids_;  // by row
  std::vector<float> raw_, sampled_, tempered_, top_values_;
  std::unique_ptr<ops::PendingSample> pending_;
};

class Sampler {
 public:
  // Borrows the decoder.
  static absl::StatusOr<std::unique_ptr<Sampler>> Create(const Decoder& decoder, int64_t max_draws);

  // Queues the draws; what they point to is not needed afterwards. hidden: [head_rows, hidden] f.
  // REQUIRES: draws.size() <= max_draws.
  absl::StatusOr<std::unique_ptr<PendingDraws>> Start(const Parameters& params, TensorView hidden,
                                                      const std::vector<Draw>& draws);
  // [max_draws] i32, device: the tokens of the last draws started, in their order if every draw has
  // a row of its own.
  TensorView drawn() const { return View1D(drawn_.data(), DType::kI32, max_draws_); }

 private:
  Sampler(const Decoder& decoder, int64_t max_draws) : decoder_(decoder), max_draws_(max_draws) {}

  // logits_ rows: one per head row, then copies for further draws of a row. Returns each draw's
  // row.
  absl::StatusOr<std::vector<int64_t>> ComputeLogits(const Parameters& params, TensorView hidden,
                                                     const std::vector<Draw>& draws);
  // Rows and biases in order of the logits rows.
  void FillRows(const std::vector<Draw>& draws, const std::vector<int64_t>& row_of);

  const Decoder& decoder_;
  const int64_t max_draws_;
  DeviceBuffer logits_, drawn_;
  std::vector<ops::SamplingRow> rows_;
  std::vector<int32_t> bias_ids_;
  std::vector<float> bias_values_;
};

}  // namespace coppice
