// PolicyTrainer: the Trainer. Owns gradients, activations and optimizer state; the weights belong
// to the Model. All that one pass keeps lies in one buffer of at most activation_bytes: a prompt's
// state and gradients, then the activations of the tree that runs. train_step.cc holds the calls
// that compute, pass_plan.cc those that choose how, prompt_pass.cc those of a prompt that runs
// apart from its branches, policy_trainer.cc creation and checkpoints.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/device.h"
#include "kernels/ops/ops.h"
#include "trainer/activations.h"
#include "trainer/backward.h"
#include "trainer/forward.h"
#include "trainer/gradient_arena.h"
#include "trainer/gradient_scale.h"
#include "trainer/optimizer.h"
#include "trainer/phase_timer.h"
#include "trainer/prompt_state.h"
#include "trainer/request_plan.h"
#include "trainer/step_cost.h"
#include "trainer/token_tree.h"
#include "trainer/trainer.h"

namespace coppice {

class PolicyTrainer final : public Trainer {
 public:
  PolicyTrainer(const Options& options, int64_t activation_bytes, Model& model,
                const Decoder& decoder, const Clock& clock);

  absl::StatusOr<ForwardBackwardResult> ForwardBackward(
      const ForwardBackwardRequest& request) override;
  absl::StatusOr<OptimStepResult> OptimStep(const AdamConfig& config) override;
  absl::Status DropGradients() override;
  absl::StatusOr<std::vector<SampleResult>> Score(const std::vector<TrainGroup>& groups,
                                                  float temperature) override;

  PolicyVersion policy_version() const override { return version_; }
  bool has_pending_gradients() const override { return pending_gradients_; }
  bool has_optimizer_state() const override { return optimizer_.has_value(); }
  const Parameters& gradients() const override { return gradients_.parameters(); }
  double gradient_scale() const override { return scale_.value(); }

  absl::Status SaveCheckpoint(absl::string_view directory) override;
  absl::Status LoadCheckpoint(absl::string_view directory) override;

 private:
  // One tree on its way through forward, loss and backward.
  struct TreeRun {
    TokenTree tree;
    PromptLink link;                         // of branches
    std::shared_ptr<const KeptPrompt> kept;  // of a prompt: what it starts from, or null
    int64_t offset_bytes = 0;                // into the pass's memory: behind what a prompt keeps
    Retention retention;                     // kNothing unless backward follows
    std::unique_ptr<ops::BatchPlan> batch;
    int64_t stem_rows = 0;  // see stem.h; the pages of a whole tree's are what offset_bytes leave
    std::unique_ptr<ops::BatchPlan> behind_stem;  // null without one
    HeadOutputs head;
    HeadGradients d_head;
  };

  // What runs together: one tree, or a prompt and its branches in micro-batches.
  struct Pass {
    std::optional<TreeRun> prompt;
    std::vector<TreeRun> batches;
  };
  static bool Retained(const TreeRun& prompt) { return prompt.retention.level > Retain::kPrompt; }
  const PromptState& StateOf(const std::shared_ptr<const KeptPrompt>& kept) const {
    return kept != nullptr ? kept->state : prompt_state_;
  }

  // Sums over the passes of one request.
  struct Totals {
    LossSums loss;
    int64_t unique = 0;
    int64_t prompt_forward_skipped = 0;
    int64_t micro_batches = 0;
    Retain least_retained = Retain::kAll;  // of any layer

    void AddPrompt(const TreeRun& prompt) {
      unique += prompt.tree.num_rows();
      if (prompt.kept != nullptr) prompt_forward_skipped += prompt.tree.num_rows();
      if (Retained(prompt)) least_retained = std::min(least_retained, prompt.retention.level);
    }
    void Add(int64_t rows, Retain retain) {
      unique += rows;
      ++micro_batches;
      least_retained = std::min(least_retained, retain);
    }
  };

  PassLimits MakeLimits(const Options& options) const;
  PassLimits CurrentLimits() const;  // of this policy version

  // ---- pass_plan.cc
  using Replan = std::function<absl::StatusOr<std::vector<PlannedPass>>(const PassLimits& limits)>;
  // The plan's passes, or cut further if that is predicted to cost less (StepCost).
  std::vector<Pass> ChoosePasses(const Replan& replan, RequestPlan& plan);
  std::vector<Pass> BuildPasses(const RequestPlan& plan,
                                const std::vector<PlannedPass>& passes) const;
  Pass BuildPass(const RequestPlan& plan, const PlannedPass& planned) const;
  static int64_t NumRows(const Pass& pass);
  static int64_t MostRowsToCut(const RequestPlan& plan, const std::vector<Pass>& passes);
  static bool CuttingMaySave(const std::vector<Pass>& passes);
  // What is kept for backward: the most that the budget holds.
  void ChooseRetention(Pass& pass) const;
  void ChooseRetention(TreeRun& run) const;
  // What the prompt of a pass retains, and its branches beside it. False if those do not fit.
  bool SetPromptLevel(Retain level, Pass& pass) const;
  void RetainNothing(std::vector<Pass>& passes) const;  // no backward follows
  StepCost CostOf(const Pass& pass) const;
  StepCost CostOf(const std::vector<Pass>& passes) const;
  void LogPlan(const std::vector<Pass>& passes, const StepCost& cost);
  void LogRetention(const TreeRun& run);
  // Makes room for the largest pass; nothing that runs later takes memory for activations.
  absl::Status Reserve(const std::vector<Pass>& passes);
  // Of the pass while it runs.
  int64_t SizeBytes(const TreeRun& run, int64_t workspace_bytes) const;
  void PlaceActivations(const TreeRun& run, Activations& activations);
  // Of attention's backward: what it wants at least and what it can use.
  struct WorkspaceBytes {
    int64_t least = 0, most = 0;
  };
  WorkspaceBytes WorkspaceOf(const TreeRun& run) const;
  absl::Status RunPass(const ForwardBackwardRequest& request, const RequestPlan& plan,
                       const PlannedPass& planned, Pass pass, PhaseTimer& phases, Totals& totals,
                       std::vector<SampleResult>& results);
  absl::Status ScorePass(const PlannedPass& planned, Pass pass, float temperature,
                         PhaseTimer& phases, std::vector<SampleResult>& results);
  absl::Status PlanBatches(TreeRun& run);
  StemLink StemOf(const TreeRun& run) const;  // of a tree without a prompt of its own
  absl::Status RunForward(TreeRun& run, float temperature, PhaseTimer& phases);
  absl::Status RunBackward(const TreeRun& run, float temperature, PhaseTimer& phases);

  // ---- A prompt that runs apart from its branches: prompt_pass.cc
  // Bytes that it keeps while they run; its state is not the trainer's if generation has kept it.
  // retained: beside its activations, which then come behind.
  int64_t PromptBytes(int64_t rows, bool kept, bool retained) const;
  int64_t MaxBranchRows(int64_t max_rows, int64_t prompt_rows) const;
  void PlacePrompt(const TreeRun& run);
  Activations& PlacePromptActivations(const TreeRun& run);
  StemLink PromptStemOf(const TreeRun& run) const;
  // Leaves its state for the branches, unless that was kept, and the log-probs that it predicts
  // itself.
  absl::Status RunPromptForward(TreeRun& run, float temperature, PhaseTimer& phases);
  // From the gradients that its branches have left. REQUIRES: all of them have run.
  absl::Status RunPromptBackward(const TreeRun& run, float temperature, PhaseTimer& phases);

  // Before the first pass of a request.
  void FixGradientScale(const LossConfig& loss, const RequestPlan& plan);
  // After an update that had a finite norm or was skipped: why.
  std::string LearnFrom(const Optimizer::Outcome& outcome);

  absl::Status EnsureGradients();
  absl::Status EnsureOptimizer();

  const int64_t activation_bytes_;
  Model& model_;
  const Decoder& decoder_;
  ops::Ops& ops_;
  const Clock& clock_;
  const PassLimits limits_;

  DeviceBuffer pass_memory_;  // where the three below are placed
  Activations activations_;
  Activations prompt_activations_;  // of a prompt that retains some, while its branches run
  PromptState prompt_state_;
  PromptGradients prompt_gradients_;
  const DType gradient_dtype_;
  GradientArena gradients_;  // empty until the first ForwardBackward
  GradientScale scale_;      // of what it holds
  double logged_scale_ = 1;
  bool finite_loss_ = true;  // of all requests whose gradients it holds
  bool pending_gradients_ = false;
  bool gradients_written_ = false;  // false: what the arena holds counts for nothing
  Retention logged_retention_;
  std::string logged_plan_;
  std::optional<Optimizer> optimizer_;
  PolicyVersion version_{0};
};

}  // namespace coppice
