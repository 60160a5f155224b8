// Runner: batches through the decoder and the sampler. A batch is queued and its tokens are read
// later; the next one may be queued before that, with rows whose tokens the device alone knows.
// Workspace and logits are allocated once, from the largest step. Owner and thread: Generator, on
// the engine thread.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/model/decoder.h"
#include "kernels/model/kv_pool.h"
#include "server/engine/sampler.h"
#include "trainer/prompt_state.h"

namespace coppice {

// Rows [row, row + n) take their tokens from draws [draw, draw + n) of the batch queued before.
struct CarriedTokens {
  int64_t row = 0;
  int64_t draw = 0;
  int64_t n = 0;
};

class Runner {
 public:
  // Device memory that Create takes: activations of the largest step, and its logits.
  static int64_t WorkspaceBytes(const Decoder& decoder, int64_t max_rows, int64_t max_draws);
  // Borrows decoder and params.
  static absl::StatusOr<std::unique_ptr<Runner>> Create(const Decoder& decoder,
                                                        const Parameters& params, int64_t max_rows,
                                                        int64_t max_draws);

  struct Work {
    const ops::TokenBatch& batch;
    const std::vector<Draw>& draws;      // from the batch's logit rows
    std::vector<KeptRows> kept;          // rows that go to their prompts' states
    std::vector<CarriedTokens> carried;  // of a batch that drew once from each of its logit rows
  };
  // Queues the batch; KV of its rows goes to `pool`. Null if it draws nothing: it has run then.
  absl::StatusOr<std::unique_ptr<PendingDraws>> Start(Work work, const KvPool& pool);

 private:
  Runner(const Decoder& decoder, const Parameters& params) : decoder_(decoder), params_(params) {}

  const Decoder& decoder_;
  const Parameters& params_;
  DeviceBuffer workspace_;
  std::unique_ptr<Sampler> sampler_;
};

}  // namespace coppice
