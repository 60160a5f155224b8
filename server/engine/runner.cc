#include "server/engine/runner.h"

#include <utility>

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

absl::StatusOr<std::unique_ptr<PendingDraws>> Runner::Start(Work work, const KvPool& pool) {
  ops::Ops& ops = decoder_.ops();
  ASSIGN_OR_RETURN(const std::unique_ptr<ops::BatchPlan> plan, ops.PlanBatch(work.batch));
  for (const CarriedTokens& c : work.carried) {
    RETURN_IF_ERROR(ops.Copy(sampler_->drawn().Rows(c.draw, c.draw + c.n),
                             plan->tokens().Rows(c.row, c.row + c.n)));
  }
  const bool keeps = !work.kept.empty();
  PromptCapture capture(ops, std::move(work.kept));
  ASSIGN_OR_RETURN(const TensorView hidden,
                   decoder_.Forward(params_, *plan, &pool, workspace_, keeps ? &capture : nullptr));
  capture.Finish();
  if (work.draws.empty()) {
    RETURN_IF_ERROR(ops.Synchronize());
    return nullptr;
  }
  return sampler_->Start(params_, hidden, work.draws);
}

}  // namespace coppice
