// A prompt that runs apart from its branches: once forward, leaving its state (not even that if
// generation has kept it), and once backward, from what the branches have added to the gradients of
// its keys and values. In between only the state is kept.
#include <algorithm>
#include <utility>

#include "kernels/base/status_macros.h"
#include "trainer/policy_trainer.h"

namespace coppice {

int64_t PolicyTrainer::PromptBytes(int64_t rows, bool kept) const {
  const ModelConfig& config = decoder_.config();
  const int64_t gradients = PromptGradients::SizeBytes(config, rows);
  if (kept) return gradients;
  return gradients + PromptState::SizeBytes(config, ops_.Info().activation_types(), rows);
}

int64_t PolicyTrainer::MaxBranchRows(int64_t max_rows, int64_t prompt_rows) const {
  const ModelConfig& config = decoder_.config();
  const ops::ActivationTypes types = ops_.Info().activation_types();
  const int64_t rest = activation_bytes_ - PromptBytes(prompt_rows, /*kept=*/false);
  const int64_t prompt_pass =
      Activations::SizeBytes(config, types, prompt_rows, /*head_rows=*/1, Retain::kPrompt);
  if (prompt_rows > max_rows || prompt_pass > rest) return 0;
  return std::min(max_rows, Activations::MaxRows(config, types, rest));
}

void PolicyTrainer::PlacePrompt(const TreeRun& run) {
  const ModelConfig& config = decoder_.config();
  const int64_t rows = run.tree.num_rows();
  char* base = static_cast<char*>(pass_memory_.data());
  prompt_gradients_.Place(config, rows, base);
  if (run.kept != nullptr) return;
  prompt_state_.Place(config, ops_.Info().activation_types(), rows,
                      base + PromptGradients::SizeBytes(config, rows));
}

absl::Status PolicyTrainer::RunPromptForward(TreeRun& run, float temperature, PhaseTimer& phases) {
  ASSIGN_OR_RETURN(run.batch, ops_.PlanBatch(run.tree.batch));
  phases.Lap("build_tree");
  PlacePrompt(run);
  PlaceActivations(run);
  activations_.UsePrompt(StateOf(run.kept));
  if (run.kept == nullptr) {
    RETURN_IF_ERROR(ForwardTree(decoder_, model_.params, *run.batch, activations_,
                                {.context = &prompt_state_}));
  }
  RETURN_IF_ERROR(ForwardTail(decoder_, model_.params, *run.batch, activations_));
  phases.Lap("forward");
  RETURN_IF_ERROR(HeadForward(ops_, model_.params, run.tree, temperature, activations_, run.head));
  phases.Lap("head");
  return absl::OkStatus();
}

absl::Status PolicyTrainer::RunPromptBackward(const TreeRun& run, float temperature,
                                              PhaseTimer& phases) {
  PlaceActivations(run);
  activations_.UsePrompt(StateOf(run.kept));
  RETURN_IF_ERROR(ForwardTail(decoder_, model_.params, *run.batch, activations_));
  const bool accumulate = std::exchange(gradients_written_, true);
  RETURN_IF_ERROR(HeadBackward(ops_, model_.params, run.tree, temperature, run.head, run.d_head,
                               activations_, gradients_, accumulate));
  phases.Lap("head");
  RETURN_IF_ERROR(BackwardTree(decoder_, model_.params, *run.batch, activations_, gradients_,
                               accumulate, {.gradients = &prompt_gradients_}));
  RETURN_IF_ERROR(ops_.Synchronize());
  phases.Lap("backward");
  return absl::OkStatus();
}

}  // namespace coppice
