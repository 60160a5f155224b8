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

// Of a score in bf16 for every head and every pair of rows that sees each other, in tiles of 128 x
// 128, whose corners so many pairs a row cover.
int64_t AttentionScoreBytes(const ModelConfig& config, const ops::TokenBatch& batch) {
  constexpr int64_t kCornerPairs = 512;
  int64_t pairs = batch.num_rows() * kCornerPairs;
  for (int64_t i = 0; i < batch.num_rows(); ++i) pairs += batch.subtree_end[i] - i;
  for (const ops::Segment& s : batch.segments) {
    for (int32_t n = s.context_node; n >= 0; n = batch.context_nodes[n].parent) {
      pairs += int64_t{s.row_end - s.row_begin} * batch.context_nodes[n].num_tokens;
    }
  }
  return pairs * config.q_heads * SizeOf(DType::kBF16);
}

// Beside the scores: in f32 two numbers a row and query head and, where scores go in rounds, the
// gradients of keys and values so far; cached keys and values as rows. A page for alignment.
int64_t AttentionRowBytes(const ModelConfig& config, const ops::TokenBatch& batch, bool rounds) {
  constexpr int64_t kTile = 128, kPage = 4096;
  const int64_t padded = (batch.num_rows() + kTile - 1) / kTile * kTile;
  int64_t context = 0;
  for (const ops::ContextNode& n : batch.context_nodes) context += n.num_tokens + kTile;
  const int64_t sums = rounds ? 2 * padded * config.kv_dim() : 0;
  return (2 * padded * config.q_heads + sums) * SizeOf(DType::kF32) +
         2 * context * config.kv_dim() * SizeOf(DType::kBF16) + kPage;
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
  ASSIGN_OR_RETURN(const RequestPlan plan,
                   PlanTraining(decoder_.config(), CurrentLimits(), request));
  RETURN_IF_ERROR(EnsureGradients());
  std::vector<Pass> passes = BuildPasses(plan);
  ChooseRetention(passes);
  RETURN_IF_ERROR(Reserve(passes));
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
  if (!gradients_written_) RETURN_IF_ERROR(ops_.Zero(gradients_.flat));  // nothing had a target
  gradients_written_ = pending_gradients_ = true;

  result.loss = totals.loss.loss();
  result.metrics = totals.loss.Metrics();
  result.metrics["passes"] = static_cast<double>(plan.passes.size());
  result.metrics["micro_batches"] = static_cast<double>(totals.micro_batches);
  result.metrics["recompute"] =
      static_cast<double>(Retain::kAll) - static_cast<double>(totals.least_retained);
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
    totals.AddPrompt(pass.prompt->tree.num_rows(), pass.prompt->kept != nullptr);
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
    run.d_head = sums.Round(with_entropy);
    first += planned.batches[b].size();
    phases.Lap("loss");
    RETURN_IF_ERROR(RunBackward(run, temperature, phases));
  }
  if (!pass.prompt.has_value()) return absl::OkStatus();
  pass.prompt->d_head = prompt_sums->Round(with_entropy);
  return RunPromptBackward(*pass.prompt, temperature, phases);
}

std::vector<PolicyTrainer::Pass> PolicyTrainer::BuildPasses(const RequestPlan& plan) const {
  std::vector<Pass> passes;
  for (const PlannedPass& planned : plan.passes) passes.push_back(BuildPass(plan, planned));
  return passes;
}

PolicyTrainer::Pass PolicyTrainer::BuildPass(const RequestPlan& plan,
                                             const PlannedPass& planned) const {
  Pass pass;
  const int64_t prompt_rows = planned.prompt_rows;
  const int64_t begin = planned.cached != nullptr ? planned.cached->tokens : prompt_rows;
  const int64_t offset = prompt_rows > 0 ? PromptBytes(prompt_rows, planned.kept != nullptr) : 0;
  std::vector<TokenSequence> all;
  for (const std::vector<int32_t>& samples : planned.batches) {
    const std::vector<TokenSequence> sequences = plan.Sequences(samples);
    TreeRun run{.tree = BuildTokenTree(sequences, limits_.share_prefixes, {.begin = begin}),
                .offset_bytes = offset};
    if (prompt_rows > 0) {
      HangBelowPrompt(prompt_rows, run.tree.batch);
      run.link = {.context = &StateOf(planned.kept), .gradients = &prompt_gradients_};
    }
    if (planned.cached != nullptr) {
      HangBelowCached(*planned.cached, run.tree.batch);
      run.link = {.pool = planned.cached->pool};
    }
    pass.batches.push_back(std::move(run));
    all.insert(all.end(), sequences.begin(), sequences.end());
  }
  if (prompt_rows > 0) {
    for (TokenSequence& s : all) s.wanted = {};  // a prompt has head rows, whatever the masks
    pass.prompt.emplace();
    pass.prompt->tree = BuildTokenTree(all, /*share=*/true, {.end = prompt_rows});
    pass.prompt->kept = planned.kept;
    pass.prompt->offset_bytes = offset;
    pass.prompt->retention = Retain::kPrompt;
    StoreAsPrompt(pass.prompt->tree.batch);
  }
  return pass;
}

void PolicyTrainer::ChooseRetention(std::vector<Pass>& passes) const {
  for (Pass& pass : passes) {
    for (TreeRun& run : pass.batches) {
      const auto choose = [&](int64_t workspace_bytes) {
        return Activations::Choose(decoder_.config(), ops_.Info().activation_types(),
                                   run.tree.num_rows(), run.tree.num_head_rows(),
                                   activation_bytes_ - run.offset_bytes, workspace_bytes);
      };
      const WorkspaceBytes workspace = WorkspaceOf(run);
      run.retention = choose(workspace.least);
      if (run.retention.level < Retain::kProjections) continue;
      // Beyond these only elementwise work is saved: less than attention saves in that memory.
      const Retention rest = choose(workspace.most);
      run.retention = rest.level < Retain::kProjections ? Retain::kProjections : rest;
    }
  }
}

PolicyTrainer::WorkspaceBytes PolicyTrainer::WorkspaceOf(const TreeRun& run) const {
  const ops::DeviceInfo device = ops_.Info();
  const ModelConfig& config = decoder_.config();
  if (device.score_bytes == 0) return {};
  const int64_t scores =
      config.head_dim < device.scores_head_dim ? 0 : AttentionScoreBytes(config, run.tree.batch);
  const int64_t kept = std::min(scores, device.score_bytes);
  const int64_t rows = AttentionRowBytes(config, run.tree.batch, /*rounds=*/kept < scores);
  return {.least = kept / 4 + rows, .most = kept + rows};
}

int64_t PolicyTrainer::SizeBytes(const TreeRun& run, int64_t workspace_bytes) const {
  if (run.tree.targets.empty()) return run.offset_bytes;  // runs nothing
  const int64_t wanted = run.retention.level == Retain::kNothing ? 0 : workspace_bytes;
  return run.offset_bytes + Activations::SizeBytes(decoder_.config(),
                                                   ops_.Info().activation_types(),
                                                   run.tree.num_rows(), run.tree.num_head_rows(),
                                                   run.retention, wanted);
}

absl::Status PolicyTrainer::Reserve(const std::vector<Pass>& passes) {
  int64_t size_bytes = 0;
  const auto add = [&](const TreeRun& run) {
    const int64_t useful = SizeBytes(run, WorkspaceOf(run).most);
    size_bytes = std::max({size_bytes, SizeBytes(run, 0), std::min(useful, activation_bytes_)});
  };
  for (const Pass& pass : passes) {
    if (pass.prompt.has_value()) add(*pass.prompt);
    for (const TreeRun& run : pass.batches) add(run);
  }
  if (size_bytes <= pass_memory_.size_bytes()) return absl::OkStatus();
  pass_memory_ = DeviceBuffer();  // free first: old and new need not exist together
  ASSIGN_OR_RETURN(pass_memory_, ops_.Allocate(size_bytes, "activations"));
  return absl::OkStatus();
}

void PolicyTrainer::PlaceActivations(const TreeRun& run) {
  activations_.Place(decoder_.config(), ops_.Info().activation_types(), run.tree.num_rows(),
                     run.tree.num_head_rows(), run.retention,
                     pass_memory_.size_bytes() - run.offset_bytes,
                     static_cast<char*>(pass_memory_.data()) + run.offset_bytes);
}

absl::Status PolicyTrainer::RunForward(TreeRun& run, float temperature, PhaseTimer& phases) {
  if (run.tree.targets.empty()) return absl::OkStatus();
  ASSIGN_OR_RETURN(run.batch, ops_.PlanBatch(run.tree.batch));
  phases.Lap("build_tree");
  PlaceActivations(run);
  RETURN_IF_ERROR(ForwardTree(decoder_, model_.params, *run.batch, activations_, run.link));
  RETURN_IF_ERROR(ForwardTail(decoder_, model_.params, *run.batch, activations_));
  phases.Lap("forward");
  RETURN_IF_ERROR(HeadForward(ops_, model_.params, run.tree, temperature, activations_, run.head));
  phases.Lap("head");
  return absl::OkStatus();
}

absl::Status PolicyTrainer::RunBackward(const TreeRun& run, float temperature, PhaseTimer& phases) {
  if (run.tree.targets.empty()) return absl::OkStatus();
  const bool accumulate = std::exchange(gradients_written_, true);
  RETURN_IF_ERROR(HeadBackward(ops_, model_.params, run.tree, temperature, run.head, run.d_head,
                               activations_, gradients_, accumulate));
  phases.Lap("head");
  RETURN_IF_ERROR(BackwardTree(decoder_, model_.params, *run.batch, activations_, gradients_,
                               accumulate, run.link));
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
  ASSIGN_OR_RETURN(const RequestPlan plan, PlanScoring(decoder_.config(), CurrentLimits(), groups));
  PhaseTimer phases(clock_);
  std::vector<Pass> passes = BuildPasses(plan);
  RETURN_IF_ERROR(Reserve(passes));
  std::vector<SampleResult> results(plan.samples.size());
  for (size_t i = 0; i < plan.passes.size(); ++i) {
    RETURN_IF_ERROR(ScorePass(plan.passes[i], std::move(passes[i]), temperature, phases, results));
  }
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

void PolicyTrainer::LogRetention(const TreeRun& run) {
  if (run.retention == logged_retention_) return;
  logged_retention_ = run.retention;
  LOG(INFO) << "activations_planned rows=" << run.tree.num_rows()
            << " head_rows=" << run.tree.num_head_rows() << ' '
            << run.retention.ToString(decoder_.config().num_layers)
            << " bytes=" << pass_memory_.size_bytes()
            << " budget_bytes=" << activation_bytes_ - run.offset_bytes;
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
  pending_gradients_ = gradients_written_ = false;  // the next pass writes over them
  return absl::OkStatus();
}

}  // namespace coppice
