#include "server/engine/runner.h"

#include "kernels/base/status_macros.h"

namespace coppice {

int64_t Runner::WorkspaceBytes(const Decoder& decoder, int64_t max_rows, int64_t max_draws) {
  return decoder.WorkspaceBytes(max_rows, max_draws) +
         max_draws * decoder.config().vocab * SizeOf(DType::kF32);
}

absl::StatusOr<std::unique_ptr<Runner>> Runner::Create(const Decoder& decoder,
                                                       const Parameters& params, int64_t max_rows,
                                                       int64_t max_draws) {
  std::unique_ptr<Runner> runner(new Runner(decoder, params));
  ASSIGN_OR_RETURN(
      runner->workspace_,
      decoder.ops().Allocate(decoder.WorkspaceBytes(max_rows, max_draws), "generation workspace"));
  ASSIGN_OR_RETURN(runner->sampler_, Sampler::Create(decoder, max_draws));
  return runner;
}

absl::StatusOr<std::vector<DrawnToken>> Runner::Run(const ops::TokenBatch& batch,
                                                    const std::vector<Draw>& draws,
                                                    const KvPool& pool,
                                                    std::vector<KeptRows> kept) {
  ASSIGN_OR_RETURN(const std::unique_ptr<ops::BatchPlan> plan, decoder_.ops().PlanBatch(batch));
  const bool keeps = !kept.empty();
  PromptCapture capture(decoder_.ops(), std::move(kept));
  ASSIGN_OR_RETURN(const TensorView hidden,
                   decoder_.Forward(params_, *plan, &pool, workspace_, keeps ? &capture : nullptr));
  capture.Finish();
  if (draws.empty()) {
    RETURN_IF_ERROR(decoder_.ops().Synchronize());
    return std::vector<DrawnToken>();
  }
  return sampler_->Run(params_, hidden, draws);
}

}  // namespace coppice
