// How a request runs: which passes, what each retains for backward, where that lies in memory.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "trainer/policy_trainer.h"

namespace coppice {
namespace {

// The most parts that a request is cut into for want of memory.
constexpr int64_t kMostParts = 8;

// Pairs of a row and one that it sees, in tiles of 128 x 128, whose corners so many pairs a row
// cover.
int64_t AttentionPairs(const ops::TokenBatch& batch) {
  constexpr int64_t kCornerPairs = 512;
  int64_t pairs = batch.num_rows() * kCornerPairs;
  for (int64_t i = 0; i < batch.num_rows(); ++i) pairs += batch.subtree_end[i] - i;
  for (const ops::Segment& s : batch.segments) {
    for (int32_t n = s.context_node; n >= 0; n = batch.context_nodes[n].parent) {
      pairs += int64_t{s.row_end - s.row_begin} * batch.context_nodes[n].num_tokens;
    }
  }
  return pairs;
}

// Of a score in bf16 for every head and pair.
int64_t AttentionScoreBytes(const ModelConfig& config, const ops::TokenBatch& batch) {
  return AttentionPairs(batch) * config.q_heads * SizeOf(DType::kBF16);
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

}  // namespace

std::vector<PolicyTrainer::Pass> PolicyTrainer::ChoosePasses(const Replan& replan,
                                                             RequestPlan& plan) {
  std::vector<Pass> best = BuildPasses(plan, plan.passes);
  StepCost least = CostOf(best);
  PassLimits limits = CurrentLimits();
  const int64_t rows = MostRowsToCut(plan, best);
  // More passes cost bytes, and save what is recomputed at most.
  const int64_t most_parts = limits.slow_context ? 1 : kMostParts;
  for (int64_t parts = 2; parts <= most_parts && CuttingMaySave(best); ++parts) {
    limits.pass_rows = (rows + parts - 1) / parts;
    absl::StatusOr<std::vector<PlannedPass>> planned = replan(limits);
    if (!planned.ok()) break;
    std::vector<Pass> passes = BuildPasses(plan, *planned);
    const StepCost cost = CostOf(passes);
    if (cost.Total() >= least.Total()) continue;
    least = cost;
    best = std::move(passes);
    plan.passes = *std::move(planned);
  }
  LogPlan(best, least);
  return best;
}

// Rows of the largest tree that may be cut, without the prompt that its parts would hang below.
// `passes`: the plan's.
int64_t PolicyTrainer::MostRowsToCut(const RequestPlan& plan, const std::vector<Pass>& passes) {
  int64_t most = 0;
  for (size_t p = 0; p < passes.size(); ++p) {
    for (size_t b = 0; b < passes[p].batches.size(); ++b) {
      const TreeRun& run = passes[p].batches[b];
      const int64_t rows = run.tree.num_rows();
      const bool hangs = passes[p].prompt.has_value() || run.link.pool != nullptr;
      int64_t prompt = 0;
      for (const TokenSequence& s : plan.Sequences(plan.passes[p].batches[b])) {
        prompt = std::max<int64_t>(prompt, s.prompt.size());
      }
      most = std::max(most, hangs ? rows : rows - std::min(prompt, rows - 1));
    }
  }
  return most;
}

// Whether products run again that smaller passes might retain: not those of a kept prompt.
bool PolicyTrainer::CuttingMaySave(const std::vector<Pass>& passes) {
  const auto recomputes = [](const TreeRun& run) {
    return run.retention.level < Retain::kProjections && !run.tree.targets.empty();
  };
  return std::any_of(passes.begin(), passes.end(), [&](const Pass& pass) {
    return std::any_of(pass.batches.begin(), pass.batches.end(), recomputes) ||
           (pass.prompt.has_value() && pass.prompt->kept == nullptr && recomputes(*pass.prompt));
  });
}

int64_t PolicyTrainer::NumRows(const Pass& pass) {
  int64_t rows = pass.prompt.has_value() ? pass.prompt->tree.num_rows() : 0;
  for (const TreeRun& run : pass.batches) rows += run.tree.num_rows();
  return rows;
}

std::vector<PolicyTrainer::Pass> PolicyTrainer::BuildPasses(
    const RequestPlan& plan, const std::vector<PlannedPass>& passes) const {
  std::vector<Pass> built;
  for (const PlannedPass& planned : passes) {
    built.push_back(BuildPass(plan, planned));
    ChooseRetention(built.back());
  }
  return built;
}

PolicyTrainer::Pass PolicyTrainer::BuildPass(const RequestPlan& plan,
                                             const PlannedPass& planned) const {
  Pass pass;
  const int64_t prompt_rows = planned.prompt_rows;
  const int64_t begin = planned.cached != nullptr ? planned.cached->tokens : prompt_rows;
  std::vector<TokenSequence> all;
  for (const std::vector<int32_t>& samples : planned.batches) {
    const std::vector<TokenSequence> sequences = plan.Sequences(samples);
    TreeRun run{.tree = BuildTokenTree(sequences, limits_.share_prefixes, {.begin = begin})};
    if (prompt_rows > 0) {
      HangBelowPrompt(prompt_rows, run.tree.batch);
      run.link = {.context = &StateOf(planned.kept), .gradients = &prompt_gradients_};
    }
    if (planned.cached != nullptr) {
      HangBelowCached(*planned.cached, run.tree.batch);
      run.link = {.pool = planned.cached->pool};
    }
    if (ops_.Info().context_gradients && !limits_.slow_context) {
      run.stem_rows = StemRows(run.tree.batch);
    }
    if (run.stem_rows > 0) {
      run.offset_bytes =
          StemPages::SizeBytes(decoder_.config(), ops_.Info().activation_types(), run.stem_rows);
    }
    pass.batches.push_back(std::move(run));
    all.insert(all.end(), sequences.begin(), sequences.end());
  }
  if (prompt_rows > 0) {
    for (TokenSequence& s : all) s.wanted = {};  // a prompt has head rows, whatever the masks
    pass.prompt = TreeRun{.tree = BuildTokenTree(all, /*share=*/true, {.end = prompt_rows}),
                          .kept = planned.kept};
    if (!limits_.slow_context) pass.prompt->stem_rows = StemRows(pass.prompt->tree.batch);
    StoreAsPrompt(pass.prompt->tree.batch);
  }
  return pass;
}

// A prompt that runs apart retains what costs least together with its branches, which have the
// rest.
void PolicyTrainer::ChooseRetention(Pass& pass) const {
  if (!pass.prompt.has_value()) {
    for (TreeRun& run : pass.batches) ChooseRetention(run);
    return;
  }
  Retain best = Retain::kPrompt;
  double least = 0;
  for (const Retain level : {Retain::kPrompt, Retain::kLean, Retain::kProjections, Retain::kAll}) {
    if (level > Retain::kPrompt && pass.prompt->kept != nullptr) break;  // it has nothing else
    if (!SetPromptLevel(level, pass) && level > Retain::kPrompt) break;
    const double cost = CostOf(pass).Total();
    if (level > Retain::kPrompt && cost >= least) continue;
    best = level;
    least = cost;
  }
  SetPromptLevel(best, pass);
}

bool PolicyTrainer::SetPromptLevel(Retain level, Pass& pass) const {
  TreeRun& prompt = *pass.prompt;
  const bool retained = level > Retain::kPrompt;
  prompt.retention = level;
  prompt.offset_bytes = PromptBytes(prompt.tree.num_rows(), prompt.kept != nullptr, retained);
  const int64_t held = retained ? SizeBytes(prompt, 0) : prompt.offset_bytes;
  bool fits = held <= activation_bytes_;
  for (TreeRun& run : pass.batches) {
    run.offset_bytes = held;
    ChooseRetention(run);
    fits = fits && SizeBytes(run, 0) <= activation_bytes_;
  }
  return fits;
}

void PolicyTrainer::ChooseRetention(TreeRun& run) const {
  const auto choose = [&](int64_t workspace_bytes) {
    return Activations::Choose(decoder_.config(), ops_.Info().activation_types(),
                               run.tree.num_rows(), run.tree.num_head_rows(),
                               activation_bytes_ - run.offset_bytes, workspace_bytes);
  };
  const WorkspaceBytes workspace = WorkspaceOf(run);
  run.retention = choose(workspace.least);
  if (run.retention.level < Retain::kProjections) return;
  // Beyond these only elementwise work is saved: less than attention saves in that memory.
  const Retention rest = choose(workspace.most);
  run.retention = rest.level < Retain::kProjections ? Retain::kProjections : rest;
}

void PolicyTrainer::RetainNothing(std::vector<Pass>& passes) const {
  for (Pass& pass : passes) {
    if (pass.prompt.has_value()) SetPromptLevel(Retain::kPrompt, pass);
    for (TreeRun& run : pass.batches) run.retention = Retain::kNothing;
  }
}

StepCost PolicyTrainer::CostOf(const Pass& pass) const {
  StepCost cost;
  const auto add = [&](const TreeRun& run) {
    if (run.tree.targets.empty()) return;  // runs nothing
    cost.AddTree(decoder_.config(), ops_.Info().activation_types(), gradient_dtype_,
                 run.tree.num_rows(), static_cast<double>(AttentionPairs(run.tree.batch)),
                 run.retention);
  };
  if (pass.prompt.has_value()) add(*pass.prompt);
  if (pass.prompt.has_value() && pass.prompt->kept != nullptr) cost.flops *= 2.0 / 3;  // no forward
  for (const TreeRun& run : pass.batches) add(run);
  return cost;
}

StepCost PolicyTrainer::CostOf(const std::vector<Pass>& passes) const {
  StepCost sum;
  for (const Pass& pass : passes) sum += CostOf(pass);
  return sum;
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

void PolicyTrainer::PlaceActivations(const TreeRun& run, Activations& activations) {
  activations.Place(decoder_.config(), ops_.Info().activation_types(), run.tree.num_rows(),
                    run.tree.num_head_rows(), run.retention,
                    pass_memory_.size_bytes() - run.offset_bytes,
                    static_cast<char*>(pass_memory_.data()) + run.offset_bytes);
}

void PolicyTrainer::LogPlan(const std::vector<Pass>& passes, const StepCost& cost) {
  int64_t rows = 0, batches = 0;
  absl::string_view prompts = "-";
  for (const Pass& pass : passes) {
    rows += NumRows(pass);
    batches += static_cast<int64_t>(pass.batches.size());
    if (pass.prompt.has_value()) prompts = Name(pass.prompt->retention.level);
  }
  std::string plan =
      absl::StrCat("passes=", passes.size(), " micro_batches=", batches, " rows=", rows,
                   " prompt=", prompts, " product_tflops=", std::llround(cost.flops / 1e12),
                   " recomputed_tflops=", std::llround(cost.recomputed / 1e12),
                   " gigabytes=", std::llround(cost.bytes / 1e9));
  if (plan == logged_plan_) return;
  logged_plan_ = std::move(plan);
  LOG(INFO) << "passes_planned " << logged_plan_;
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

}  // namespace coppice
