// The calls of PolicyTrainer that compute: each reads as a list of named steps.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "trainer/policy_trainer.h"
#include "trainer/sample_paths.h"
#include "trainer/validate.h"

namespace coppice {
namespace {

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

absl::Status CheckFinite(const std::vector<TrainGroup>& groups,
                         const std::vector<SampleResult>& results) {
  size_t i = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    for (size_t s = 0; s < groups[g].samples.size(); ++s, ++i) {
      for (const float logprob : results[i].logprobs) {
        if (std::isfinite(logprob)) continue;
        return absl::FailedPreconditionError(absl::StrCat(
            "score: group ", g, " sample ", s, ": want finite log-probs, got ", logprob,
            "; the weights are damaged, or its tokens leave the range of f16: use "
            "--compute_dtype=bf16"));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ForwardBackwardResult> PolicyTrainer::ForwardBackward(
    const ForwardBackwardRequest& request) {
  PhaseTimer phases(clock_);
  ASSIGN_OR_RETURN(RequestPlan plan, PlanTraining(decoder_.config(), CurrentLimits(), request));
  RETURN_IF_ERROR(EnsureGradients());
  std::vector<Pass> passes = ChoosePasses(
      [&](const PassLimits& limits) { return PlanTrainingPasses(plan, request.groups, limits); },
      plan);
  RETURN_IF_ERROR(Reserve(passes));
  FixGradientScale(request.loss, plan);
  phases.Lap("build_tree");

  Totals totals;
  ForwardBackwardResult result;
  result.samples.resize(plan.samples.size());
  for (size_t i = 0; i < plan.passes.size(); ++i) {
    const absl::Status status = RunPass(request, plan, plan.passes[i], std::move(passes[i]), phases,
                                        totals, result.samples);
    if (status.ok()) continue;
    LOG(ERROR) << "forward_backward_failed policy_version=" << Raw(version_)
               << " gradients=dropped status=\"" << status << '"';
    RETURN_IF_ERROR(DropGradients());
    return status;
  }
  if (!gradients_written_) RETURN_IF_ERROR(gradients_.Zero(ops_));  // nothing had a target
  gradients_written_ = pending_gradients_ = true;

  result.loss = totals.loss.loss();
  finite_loss_ &= std::isfinite(result.loss);
  result.metrics = totals.loss.Metrics();
  result.metrics["passes"] = static_cast<double>(plan.passes.size());
  result.metrics["micro_batches"] = static_cast<double>(totals.micro_batches);
  result.metrics["recompute"] =
      static_cast<double>(Retain::kAll) - static_cast<double>(totals.least_retained);
  if (scale_.chosen()) result.metrics["gradient_scale"] = scale_.value();
  result.metrics["activation_bytes"] = static_cast<double>(pass_memory_.size_bytes());
  result.tokens = {.flat = NumFlatRows(plan),
                   .unique = totals.unique,
                   .prompt_forward_skipped = totals.prompt_forward_skipped,
                   .with_loss = plan.with_loss};
  result.phases = phases.Take();
  return result;
}

absl::Status PolicyTrainer::RunPass(const ForwardBackwardRequest& request, const RequestPlan& plan,
                                    const PlannedPass& planned, Pass pass, PhaseTimer& phases,
                                    Totals& totals, std::vector<SampleResult>& results) {
  const float temperature = request.loss.temperature;
  const bool with_entropy = request.loss.entropy_coef != 0;
  std::optional<HeadGradientSums> prompt_sums;
  if (pass.prompt.has_value()) {
    RETURN_IF_ERROR(RunPromptForward(*pass.prompt, temperature, phases));
    RETURN_IF_ERROR(prompt_gradients_.Zero(ops_));
    prompt_sums.emplace(pass.prompt->tree);
    totals.AddPrompt(*pass.prompt);
  }
  size_t first = 0;  // sample of the pass
  for (size_t b = 0; b < pass.batches.size(); ++b) {
    TreeRun& run = pass.batches[b];
    LogRetention(run);
    totals.Add(run.tree.num_rows(), run.retention.level);
    RETURN_IF_ERROR(RunForward(run, temperature, phases));

    HeadGradientSums sums(run.tree);
    std::vector<PathSource> sources = {{run.tree, run.head, 0, &sums}};
    if (pass.prompt.has_value()) {
      sources.push_back({pass.prompt->tree, pass.prompt->head, first, &*prompt_sums});
    }
    EvaluateLoss(request, plan, planned.batches[b], sources, totals.loss, results);
    run.d_head = sums.Round(with_entropy, scale_.value());
    first += planned.batches[b].size();
    phases.Lap("loss");
    RETURN_IF_ERROR(RunBackward(run, temperature, phases));
  }
  if (!pass.prompt.has_value()) return absl::OkStatus();
  pass.prompt->d_head = prompt_sums->Round(with_entropy, scale_.value());
  return RunPromptBackward(*pass.prompt, temperature, phases);
}

absl::Status PolicyTrainer::PlanBatches(TreeRun& run) {
  ASSIGN_OR_RETURN(run.batch, ops_.PlanBatch(run.tree.batch));
  if (run.stem_rows == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(run.behind_stem, ops_.PlanBatch(BehindStem(run.tree.batch, run.stem_rows)));
  return absl::OkStatus();
}

StemLink PolicyTrainer::StemOf(const TreeRun& run) const {
  if (run.stem_rows == 0) return {};
  return {.rows = run.stem_rows,
          .behind = run.behind_stem.get(),
          .pages = StemPages::Place(decoder_.config(), ops_.Info().activation_types(),
                                    run.stem_rows, pass_memory_.data()),
          .own = true};
}

absl::Status PolicyTrainer::RunForward(TreeRun& run, float temperature, PhaseTimer& phases) {
  if (run.tree.targets.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(PlanBatches(run));
  phases.Lap("build_tree");
  PlaceActivations(run, activations_);
  RETURN_IF_ERROR(
      ForwardTree(decoder_, model_.params, *run.batch, activations_, run.link, StemOf(run)));
  RETURN_IF_ERROR(ForwardTail(decoder_, model_.params, *run.batch, activations_));
  phases.Lap("forward");
  if (run.retention.level != Retain::kNothing) run.head.lent = activations_.spare();
  RETURN_IF_ERROR(HeadForward(ops_, model_.params, run.tree, temperature, activations_, run.head));
  phases.Lap("head");
  return absl::OkStatus();
}

absl::Status PolicyTrainer::RunBackward(const TreeRun& run, float temperature, PhaseTimer& phases) {
  if (run.tree.targets.empty()) return absl::OkStatus();
  const bool accumulate = std::exchange(gradients_written_, true);
  RETURN_IF_ERROR(HeadBackward(ops_, model_.params, run.tree, temperature, run.head, run.d_head,
                               activations_, gradients_.parameters(), accumulate));
  phases.Lap("head");
  RETURN_IF_ERROR(BackwardTree(decoder_, model_.params, *run.batch, activations_,
                               gradients_.parameters(), accumulate, run.link, StemOf(run)));
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
                   optimizer_->Step(config, model_.params, gradients_, scale_.value(), ops_));
  OptimStepResult result{.skip_reason = LearnFrom(outcome), .grad_norm = outcome.grad_norm};
  RETURN_IF_ERROR(DropGradients());
  if (outcome.updated) {
    version_ = Next(version_);
  } else {
    result.skipped = true;
    LOG(WARNING) << "optimizer_step_skipped policy_version=" << Raw(version_) << " reason=\""
                 << result.skip_reason << '"';
  }
  result.policy_version = version_;
  result.seconds = absl::ToDoubleSeconds(clock_.Now() - start);
  return result;
}

absl::StatusOr<std::vector<SampleResult>> PolicyTrainer::Score(
    const std::vector<TrainGroup>& groups, float temperature) {
  RETURN_IF_ERROR(ValidateTemperature(temperature));
  ASSIGN_OR_RETURN(RequestPlan plan, PlanScoring(decoder_.config(), CurrentLimits(), groups));
  PhaseTimer phases(clock_);
  // As training runs them, for its bits.
  std::vector<Pass> passes = ChoosePasses(
      [&](const PassLimits& limits) { return PlanScoringPasses(plan, groups, limits); }, plan);
  RetainNothing(passes);
  RETURN_IF_ERROR(Reserve(passes));
  std::vector<SampleResult> results(plan.samples.size());
  for (size_t i = 0; i < plan.passes.size(); ++i) {
    RETURN_IF_ERROR(ScorePass(plan.passes[i], std::move(passes[i]), temperature, phases, results));
  }
  RETURN_IF_ERROR(CheckFinite(groups, results));
  return results;
}

absl::Status PolicyTrainer::ScorePass(const PlannedPass& planned, Pass pass, float temperature,
                                      PhaseTimer& phases, std::vector<SampleResult>& results) {
  if (pass.prompt.has_value()) {
    RETURN_IF_ERROR(RunPromptForward(*pass.prompt, temperature, phases));
  }
  size_t first = 0;
  for (size_t b = 0; b < pass.batches.size(); ++b) {
    TreeRun& run = pass.batches[b];
    RETURN_IF_ERROR(RunForward(run, temperature, phases));
    std::vector<PathSource> sources = {{run.tree, run.head}};
    if (pass.prompt.has_value()) {
      sources.push_back({pass.prompt->tree, pass.prompt->head, first});
    }
    for (size_t i = 0; i < planned.batches[b].size(); ++i) {
      SamplePath path = GatherPath(sources, i);
      SampleResult& result = results[planned.batches[b][i]];
      result.entropy = MeanEntropy(path);
      result.logprobs = std::move(path.logprobs);
    }
    first += planned.batches[b].size();
  }
  return absl::OkStatus();
}

void PolicyTrainer::FixGradientScale(const LossConfig& loss, const RequestPlan& plan) {
  double largest = 0;
  for (size_t i = 0; i < plan.samples.size(); ++i) {
    largest = std::max(largest,
                       LargestCoefficient(loss, plan.counts, *plan.samples[i], plan.advantages[i]));
  }
  scale_.Fix(largest);
  if (!scale_.chosen() || scale_.value() == logged_scale_) return;
  logged_scale_ = scale_.value();
  LOG(INFO) << "gradient_scale value=" << logged_scale_ << " largest_coefficient=" << largest;
}

std::string PolicyTrainer::LearnFrom(const Optimizer::Outcome& outcome) {
  const bool f16 = ops_.Info().compute_dtype == DType::kF16;
  std::string reason = absl::StrCat("gradient norm is not finite: ", outcome.grad_norm);
  if (!outcome.updated && !finite_loss_) {  // before any gradient: no scale would help
    return absl::StrCat(reason, "; log-probs are not finite: ",
                        f16 ? "activations exceed f16, use --compute_dtype=bf16, or " : "",
                        "weights are damaged");
  }
  const double scale = scale_.value();
  const bool lowered = scale_.Learn(outcome.updated);
  if (outcome.updated) return "";
  if (!f16) return reason;
  if (lowered) {
    return absl::StrCat(reason, "; gradient scale ", scale, " is lowered by up to 4");
  }
  return absl::StrCat(reason,
                      "; gradients are not scaled, divide weights or denominator if coefficients "
                      "exceed 64, or use --compute_dtype=bf16");
}

absl::Status PolicyTrainer::EnsureGradients() {
  if (gradients_.present()) return absl::OkStatus();
  ASSIGN_OR_RETURN(gradients_, GradientArena::Create(decoder_.config(), gradient_dtype_, ops_));
  return absl::OkStatus();
}

absl::Status PolicyTrainer::EnsureOptimizer() {
  if (optimizer_.has_value()) return absl::OkStatus();
  ASSIGN_OR_RETURN(optimizer_, Optimizer::Create(decoder_.config(), model_.params, ops_));
  return absl::OkStatus();
}

absl::Status PolicyTrainer::DropGradients() {
  pending_gradients_ = gradients_written_ = false;  // the next pass writes over them
  finite_loss_ = true;
  scale_.Forget();
  return absl::OkStatus();
}

}  // namespace coppice
