// PolicyTrainer: the Trainer. Owns gradients, activations and optimizer state; the weights belong
// to the Model. train_step.cc holds the calls that compute, policy_trainer.cc creation and
// checkpoints.
#pragma once

#include <optional>
#include <vector>

#include "kernels/base/device.h"
#include "kernels/ops/ops.h"
#include "trainer/activations.h"
#include "trainer/backward.h"
#include "trainer/forward.h"
#include "trainer/optimizer.h"
#include "trainer/phase_timer.h"
#include "trainer/request_plan.h"
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
  absl::StatusOr<std::vector<SampleResult>> Score(const std::vector<TrainGroup>& groups,
                                                  float temperature) override;

  PolicyVersion policy_version() const override { return version_; }
  bool has_pending_gradients() const override { return pending_gradients_; }
  bool has_optimizer_state() const override { return optimizer_.has_value(); }
  const Parameters& gradients() const override { return gradients_; }

  absl::Status SaveCheckpoint(absl::string_view directory) override;
  absl::Status LoadCheckpoint(absl::string_view directory) override;

 private:
  // One micro-batch on its way through forward, loss and backward.
  struct Pass {
    TokenTree tree;
    std::unique_ptr<ops::BatchPlan> batch;
    HeadOutputs head;
    HeadGradients d_head;
  };

  // Sums over the passes of one request.
  struct Totals {
    LossSums loss;
    int64_t unique = 0;
    Retain least_retained = Retain::kAll;
  };

  std::vector<TokenTree> BuildTrees(const RequestPlan& plan) const;  // one per pass
  // Allocates what the largest pass needs.
  absl::Status ReserveActivations(const std::vector<TokenTree>& trees);
  absl::Status RunPass(const ForwardBackwardRequest& request, const RequestPlan& plan, size_t index,
                       TokenTree tree, PhaseTimer& phases, Totals& totals,
                       std::vector<SampleResult>& results);
  absl::StatusOr<Pass> BuildPass(TokenTree tree) const;
  absl::Status RunForward(Pass& pass, Retain retain, float temperature, PhaseTimer& phases);
  absl::Status RunBackward(const Pass& pass, float temperature, PhaseTimer& phases);
  Retain ChooseRetain(const TokenTree& tree) const;
  absl::Status EnsureGradients();
  absl::Status EnsureOptimizer();
  absl::Status DropGradients();

  const int64_t activation_bytes_;
  const PassLimits limits_;
  Model& model_;
  const Decoder& decoder_;
  ops::Ops& ops_;
  const Clock& clock_;

  Activations activations_;
  DeviceBuffer gradient_buffer_;
  Parameters gradients_;  // f32; empty until the first ForwardBackward
  bool pending_gradients_ = false;
  std::optional<Optimizer> optimizer_;
  PolicyVersion version_{0};
};

}  // namespace coppice
