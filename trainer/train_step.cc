// The calls of PolicyTrainer that compute: each reads as a list of named steps.
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "trainer/policy_trainer.h"
#include "trainer/validate.h"

namespace coppice {
namespace {

// Log-probs and entropies of one sample, gathered along its path; zero where no log-prob was
// wanted.
struct SamplePath {
  std::vector<float> logprobs;
  std::vector<float> entropy;
};

SamplePath GatherPath(const std::vector<TargetRef>& refs, const HeadOutputs& head) {
  SamplePath path{.logprobs = std::vector<float>(refs.size()),
                  .entropy = std::vector<float>(refs.size())};
  for (size_t t = 0; t < refs.size(); ++t) {
    if (refs[t].target < 0) continue;
    path.logprobs[t] = head.logprobs[refs[t].target];
    path.entropy[t] = head.entropy[refs[t].head_row];
  }
  return path;
}

// Adds up derivatives by unique token, in double and in sample order.
class HeadGradientSums {
 public:
  explicit HeadGradientSums(const TokenTree& tree)
      : d_logprobs_(tree.targets.size()), d_entropy_(tree.num_head_rows()) {}

  void Add(const std::vector<TargetRef>& refs, const SampleGradient& gradient) {
    for (size_t t = 0; t < refs.size(); ++t) {
      if (refs[t].target < 0) continue;
      d_logprobs_[refs[t].target] += gradient.d_logprobs[t];
      d_entropy_[refs[t].head_row] += gradient.d_entropy[t];
    }
  }

  HeadGradients Round(bool with_entropy) const {
    HeadGradients rounded;
    rounded.d_logprobs.assign(d_logprobs_.begin(), d_logprobs_.end());
    if (with_entropy) rounded.d_entropy.assign(d_entropy_.begin(), d_entropy_.end());
    return rounded;
  }

 private:
  std::vector<double> d_logprobs_, d_entropy_;
};

// Every sample's own loss terms; what is shared meets again in the sums over unique tokens.
HeadGradients EvaluateLoss(const ForwardBackwardRequest& request, const RequestPlan& plan,
                           const std::vector<int32_t>& samples, const TokenTree& tree,
                           const HeadOutputs& head, LossSums& sums,
                           std::vector<SampleResult>& results) {
  HeadGradientSums gradient_sums(tree);
  for (size_t i = 0; i < samples.size(); ++i) {
    const int32_t s = samples[i];
    SamplePath path = GatherPath(tree.samples[i], head);
    const SampleView view{.sample = *plan.samples[s],
                          .logprobs = path.logprobs,
                          .entropy = path.entropy,
                          .advantages = plan.advantages[s]};
    gradient_sums.Add(tree.samples[i],
                      EvaluateSample(request.loss, plan.counts, view, sums, results[s]));
    if (request.return_logprobs) results[s].logprobs = std::move(path.logprobs);
  }
  return gradient_sums.Round(request.loss.entropy_coef != 0);
}

int64_t NumFlatRows(const RequestPlan& plan) {
  int64_t rows = 0;
  for (const TokenSequence& s : plan.sequences) rows += s.num_rows();
  return rows;
}

double MeanEntropy(const SamplePath& path) {
  double sum = 0;
  for (const float e : path.entropy) sum += e;
  return sum / static_cast<double>(path.entropy.size());
}

}  // namespace

absl::StatusOr<ForwardBackwardResult> PolicyTrainer::ForwardBackward(
    const ForwardBackwardRequest& request) {
  PhaseTimer phases(clock_);
  ASSIGN_OR_RETURN(const RequestPlan plan, PlanTraining(decoder_.config(), limits_, request));
  RETURN_IF_ERROR(EnsureGradients());
  std::vector<TokenTree> trees = BuildTrees(plan);
  RETURN_IF_ERROR(ReserveActivations(trees));  // so that no later pass can lack memory
  phases.Lap("build_tree");

  Totals totals;
  ForwardBackwardResult result;
  result.samples.resize(plan.samples.size());
  for (size_t i = 0; i < plan.passes.size(); ++i) {
    const absl::Status status =
        RunPass(request, plan, i, std::move(trees[i]), phases, totals, result.samples);
    if (status.ok()) continue;
    LOG(ERROR) << "forward_backward_failed policy_version=" << Raw(version_)
               << " gradients=dropped status=\"" << status << '"';
    RETURN_IF_ERROR(DropGradients());
    return status;
  }
  pending_gradients_ = true;

  result.loss = totals.loss.loss();
  result.metrics = totals.loss.Metrics();
  result.metrics["passes"] = static_cast<double>(plan.passes.size());
  result.metrics["recompute"] =
      static_cast<double>(Retain::kAll) - static_cast<double>(totals.least_retained);
  result.metrics["activation_bytes"] = static_cast<double>(activations_.size_bytes());
  result.tokens = {.flat = NumFlatRows(plan), .unique = totals.unique, .with_loss = plan.with_loss};
  result.phases = phases.Take();
  return result;
}

absl::Status PolicyTrainer::RunPass(const ForwardBackwardRequest& request, const RequestPlan& plan,
                                    size_t index, TokenTree tree, PhaseTimer& phases,
                                    Totals& totals, std::vector<SampleResult>& results) {
  ASSIGN_OR_RETURN(Pass pass, BuildPass(std::move(tree)));
  phases.Lap("build_tree");
  totals.unique += pass.tree.num_rows();
  const float temperature = request.loss.temperature;
  const Retain retain = ChooseRetain(pass.tree);
  totals.least_retained = std::min(totals.least_retained, retain);

  RETURN_IF_ERROR(RunForward(pass, retain, temperature, phases));
  pass.d_head =
      EvaluateLoss(request, plan, plan.passes[index], pass.tree, pass.head, totals.loss, results);
  phases.Lap("loss");
  return RunBackward(pass, temperature, phases);
}

std::vector<TokenTree> PolicyTrainer::BuildTrees(const RequestPlan& plan) const {
  std::vector<TokenTree> trees;
  for (size_t i = 0; i < plan.passes.size(); ++i) {
    trees.push_back(BuildTokenTree(plan.PassSequences(i), limits_.share_prefixes));
  }
  return trees;
}

absl::Status PolicyTrainer::ReserveActivations(const std::vector<TokenTree>& trees) {
  for (const TokenTree& tree : trees) {
    if (tree.targets.empty()) continue;
    RETURN_IF_ERROR(activations_.Prepare(decoder_.config(), ops_, tree.num_rows(),
                                         tree.num_head_rows(), ChooseRetain(tree)));
  }
  return absl::OkStatus();
}

absl::StatusOr<PolicyTrainer::Pass> PolicyTrainer::BuildPass(TokenTree tree) const {
  Pass pass;
  pass.tree = std::move(tree);
  ASSIGN_OR_RETURN(pass.batch, ops_.PlanBatch(pass.tree.batch));
  return pass;
}

absl::Status PolicyTrainer::RunForward(Pass& pass, Retain retain, float temperature,
                                       PhaseTimer& phases) {
  if (pass.tree.targets.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(activations_.Prepare(decoder_.config(), ops_, pass.tree.num_rows(),
                                       pass.tree.num_head_rows(), retain));
  RETURN_IF_ERROR(ForwardTree(decoder_, model_.params, *pass.batch, activations_));
  phases.Lap("forward");
  RETURN_IF_ERROR(
      HeadForward(ops_, model_.params, pass.tree, temperature, activations_, pass.head));
  phases.Lap("head");
  return absl::OkStatus();
}

absl::Status PolicyTrainer::RunBackward(const Pass& pass, float temperature, PhaseTimer& phases) {
  if (pass.tree.targets.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(HeadBackward(ops_, model_.params, pass.tree, temperature, pass.head, pass.d_head,
                               activations_, gradients_));
  phases.Lap("head");
  RETURN_IF_ERROR(BackwardTree(decoder_, model_.params, *pass.batch, activations_, gradients_));
  RETURN_IF_ERROR(ops_.Synchronize());
  phases.Lap("backward");
  return absl::OkStatus();
}

absl::StatusOr<OptimStepResult> PolicyTrainer::OptimStep(const AdamConfig& config) {
  RETURN_IF_ERROR(ValidateAdam(config));
  if (!pending_gradients_) {
    return absl::FailedPreconditionError(
        "optimizer step refused: no pending gradients; call ForwardBackward first");
  }
  const absl::Duration start = clock_.Now();
  RETURN_IF_ERROR(EnsureOptimizer());
  ASSIGN_OR_RETURN(const Optimizer::Outcome outcome,
                   optimizer_->Step(config, model_.params, gradients_, ops_));
  RETURN_IF_ERROR(DropGradients());
  OptimStepResult result{.grad_norm = outcome.grad_norm};
  if (outcome.updated) {
    version_ = Next(version_);
  } else {
    result.skipped = true;
    result.skip_reason = absl::StrCat("gradient norm is not finite: ", outcome.grad_norm);
    LOG(WARNING) << "optimizer_step_skipped policy_version=" << Raw(version_)
                 << " grad_norm=" << outcome.grad_norm;
  }
  result.policy_version = version_;
  result.seconds = absl::ToDoubleSeconds(clock_.Now() - start);
  return result;
}

absl::StatusOr<std::vector<SampleResult>> PolicyTrainer::Score(
    const std::vector<TrainGroup>& groups, float temperature) {
  RETURN_IF_ERROR(ValidateTemperature(temperature));
  ASSIGN_OR_RETURN(const RequestPlan plan, PlanScoring(decoder_.config(), limits_, groups));
  PhaseTimer phases(clock_);
  std::vector<TokenTree> trees = BuildTrees(plan);
  std::vector<SampleResult> results(plan.samples.size());
  for (size_t i = 0; i < plan.passes.size(); ++i) {
    ASSIGN_OR_RETURN(Pass pass, BuildPass(std::move(trees[i])));
    RETURN_IF_ERROR(RunForward(pass, Retain::kNothing, temperature, phases));
    for (size_t j = 0; j < plan.passes[i].size(); ++j) {
      SamplePath path = GatherPath(pass.tree.samples[j], pass.head);
      SampleResult& result = results[plan.passes[i][j]];
      result.entropy = MeanEntropy(path);
      result.logprobs = std::move(path.logprobs);
    }
  }
  return results;
}

Retain PolicyTrainer::ChooseRetain(const TokenTree& tree) const {
  return Activations::Choose(decoder_.config(), ops_.Info().compute_dtype, tree.num_rows(),
                             tree.num_head_rows(), activation_bytes_);
}

absl::Status PolicyTrainer::EnsureGradients() {
  if (gradients_.flat.present()) return absl::OkStatus();
  const ModelConfig& config = decoder_.config();
  const int64_t bytes = NumParameterElements(config) * SizeOf(DType::kF32);
  ASSIGN_OR_RETURN(gradient_buffer_, ops_.Allocate(bytes, "gradients"));
  gradients_ = MapParameters(config, gradient_buffer_.data(), DType::kF32);
  return absl::OkStatus();
}

absl::Status PolicyTrainer::EnsureOptimizer() {
  if (optimizer_.has_value()) return absl::OkStatus();
  ASSIGN_OR_RETURN(optimizer_, Optimizer::Create(decoder_.config(), model_.params, ops_));
  return absl::OkStatus();
}

absl::Status PolicyTrainer::DropGradients() {
  pending_gradients_ = false;
  return gradients_.flat.present() ? ops_.Zero(gradients_.flat) : absl::OkStatus();
}

}  // namespace coppice
