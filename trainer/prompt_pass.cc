// A prompt that runs apart from its branches: once forward, leaving its state (not even that if
// generation has kept it), and once backward, from what the branches have added to the gradients of
// its keys and values. In between only the state is kept, or the prompt's activations.
#include <algorithm>
#include <utility>

#include "kernels/base/status_macros.h"
#include "trainer/policy_trainer.h"

namespace coppice {

int64_t PolicyTrainer::PromptBytes(int64_t rows, bool kept, bool retained) const {
  const ModelConfig& config = decoder_.config();
  const int64_t gradients = PromptGradients::SizeBytes(config, rows);
  if (kept) return gradients;
  return gradients + PromptState::SizeBytes(config, ops_.Info().activation_types(), rows, retained);
}

int64_t PolicyTrainer::MaxBranchRows(int64_t max_rows, int64_t prompt_rows) const {
  const ModelConfig& config = decoder_.config();
  const ops::ActivationTypes types = ops_.Info().activation_types();
  const int64_t rest =
      activation_bytes_ - PromptBytes(prompt_rows, /*kept=*/false, /*retained=*/false);
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
                      base + PromptGradients::SizeBytes(config, rows), Retained(run));
}

Activations& PolicyTrainer::PlacePromptActivations(const TreeRun& run) {
  Activations& activations = Retained(run) ? prompt_activations_ : activations_;
  PlaceActivations(run, activations);
  if (!Retained(run)) activations.UsePrompt(StateOf(run.kept));
  return activations;
}

StemLink PolicyTrainer::PromptStemOf(const TreeRun& run) const {
  if (run.stem_rows == 0) return {};
  const int64_t last = decoder_.config().num_layers - 1;
  return {.rows = run.stem_rows,
          .behind = run.behind_stem.get(),
          .pages = {.kv = StateOf(run.kept).layer(last).pages,
                    .gradients = prompt_gradients_.pages(last)}};
}

absl::Status PolicyTrainer::RunPromptForward(TreeRun& run, float temperature, PhaseTimer& phases) {
  RETURN_IF_ERROR(PlanBatches(run));
  phases.Lap("build_tree");
  PlacePrompt(run);
  Activations& activations = PlacePromptActivations(run);
  if (run.kept == nullptr) {
    RETURN_IF_ERROR(ForwardTree(decoder_, model_.params, *run.batch, activations,
                                {.context = &prompt_state_}, PromptStemOf(run)));
  }
  RETURN_IF_ERROR(ForwardTail(decoder_, model_.params, *run.batch, activations));
  phases.Lap("forward");
  RETURN_IF_ERROR(HeadForward(ops_, model_.params, run.tree, temperature, activations, run.head));
  phases.Lap("head");
  return absl::OkStatus();
}

absl::Status PolicyTrainer::RunPromptBackward(const TreeRun& run, float temperature,
                                              PhaseTimer& phases) {
  if (!Retained(run)) {
    const Activations& placed = PlacePromptActivations(run);
    RETURN_IF_ERROR(ForwardTail(decoder_, model_.params, *run.batch, placed));
  }
  const Activations& activations = Retained(run) ? prompt_activations_ : activations_;
  const bool accumulate = std::exchange(gradients_written_, true);
  RETURN_IF_ERROR(HeadBackward(ops_, model_.params, run.tree, temperature, run.head, run.d_head,
                               activations, gradients_.parameters(), accumulate));
  phases.Lap("head");
  RETURN_IF_ERROR(BackwardTree(decoder_, model_.params, *run.batch, activations,
                               gradients_.parameters(), accumulate,
                               {.gradients = &prompt_gradients_}, PromptStemOf(run)));
  RETURN_IF_ERROR(ops_.Synchronize());
  phases.Lap("backward");
  return absl::OkStatus();
}

}  // namespace coppice
