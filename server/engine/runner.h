// Runner: one batch through the decoder and the sampler. Workspace and logits are allocated once,
// from the largest step. Owner and thread: Generator, on the engine thread.
#pragma once

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/model/decoder.h"
#include "kernels/model/kv_pool.h"
#include "server/engine/sampler.h"
#include "trainer/prompt_state.h"

namespace coppice {

class Runner {
 public:
  // Device memory that Create takes: activations of the largest step, and its logits.
  static int64_t WorkspaceBytes(const Decoder& decoder, int64_t max_rows, int64_t max_draws);
  // Borrows decoder and params.
  static absl::StatusOr<std::unique_ptr<Runner>> Create(const Decoder& decoder,
                                                        const Parameters& params, int64_t max_rows,
                                                        int64_t max_draws);

  // KV of the rows goes to `pool`, what `kept` names to their prompts' states; the tokens drawn
  // from the batch's logit rows come back in order of `draws`.
  absl::StatusOr<std::vector<DrawnToken>> Run(const ops::TokenBatch& batch,
                                              const std::vector<Draw>& draws, const KvPool& pool,
                                              std::vector<KeptRows> kept = {});

 private:
  Runner(const Decoder& decoder, const Parameters& params) : decoder_(decoder), params_(params) {}

  const Decoder& decoder_;
  const Parameters& params_;
  DeviceBuffer workspace_;
  std::unique_ptr<Sampler> sampler_;
};

}  // namespace coppice
