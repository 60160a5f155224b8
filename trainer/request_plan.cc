#include "trainer/request_plan.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "trainer/advantages.h"
#include "trainer/branch_batches.h"
#include "trainer/validate.h"

namespace coppice {
namespace {

int64_t NumRows(absl::Span<const TokenSequence> sequences, bool share) {
  if (share) return CountTreeRows(sequences);
  int64_t rows = 0;
  for (const TokenSequence& s : sequences) rows += s.num_rows();
  return rows;
}

// Samples [begin, end) of one group and the rows that it needs alone.
struct GroupRange {
  size_t index = 0;
  size_t begin = 0;
  size_t end = 0;
  int64_t rows = 0;
  absl::Span<const int32_t> prompt;
};

int64_t CommonPrompt(const GroupRange& a, const GroupRange& b) {
  const size_t limit = std::min(a.prompt.size(), b.prompt.size());
  const auto end = a.prompt.begin() + limit;
  return std::mismatch(a.prompt.begin(), end, b.prompt.begin()).first - a.prompt.begin();
}

std::vector<GroupRange> MeasureGroups(const RequestPlan& plan,
                                      const std::vector<TrainGroup>& groups,
                                      const PassLimits& limits) {
  std::vector<GroupRange> ranges;
  size_t begin = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const size_t count = groups[g].samples.size();
    const auto sequences = absl::MakeSpan(plan.sequences).subspan(begin, count);
    ranges.push_back({.index = g,
                      .begin = begin,
                      .end = begin + count,
                      .rows = NumRows(sequences, limits.share_prefixes),
                      .prompt = groups[g].prompt});
    begin += count;
  }
  return ranges;
}

// Batches of the group's samples, each of at most `max_rows` behind its first `prefix` tokens.
std::optional<std::vector<std::vector<int32_t>>> CutSamples(const RequestPlan& plan,
                                                            const GroupRange& group, int64_t prefix,
                                                            int64_t max_rows) {
  const auto sequences =
      absl::MakeSpan(plan.sequences).subspan(group.begin, group.end - group.begin);
  std::optional<std::vector<std::vector<int32_t>>> batches =
      CutBranches(sequences, prefix, max_rows);
  if (!batches.has_value()) return batches;
  for (std::vector<int32_t>& batch : *batches) {
    for (int32_t& sample : batch) sample += static_cast<int32_t>(group.begin);
  }
  return batches;
}

// A pass of its own for a group that is too large for a common one.
absl::StatusOr<PlannedPass> CutGroup(const RequestPlan& plan, const GroupRange& group,
                                     const PassLimits& limits) {
  const auto refused = [&](absl::string_view what, int64_t want, int64_t got) {
    return absl::InvalidArgumentError(absl::StrCat(
        "train request refused: group ", group.index, " wants at most ", want, " ", what, ", got ",
        got, "; send fewer or shorter samples, or raise --max_train_rows or --activation_bytes"));
  };
  if (!limits.share_prefixes || limits.max_branch_rows == nullptr) {
    return refused("unique tokens", limits.max_rows, group.rows);
  }
  const int64_t prompt_rows = static_cast<int64_t>(group.prompt.size());
  const int64_t max_rows = std::min(limits.pass_rows, limits.max_branch_rows(prompt_rows));
  if (max_rows <= 0) return refused("unique tokens", limits.max_rows, group.rows);
  std::optional<std::vector<std::vector<int32_t>>> batches =
      CutSamples(plan, group, prompt_rows, max_rows);
  if (!batches.has_value()) {
    const auto sequences =
        absl::MakeSpan(plan.sequences).subspan(group.begin, group.end - group.begin);
    int64_t longest = 0;
    for (const TokenSequence& s : sequences) longest = std::max(longest, s.num_rows());
    return refused("tokens in a response", max_rows + 1, longest - prompt_rows + 1);
  }
  return PlannedPass{.prompt_rows = prompt_rows, .batches = *std::move(batches)};
}

// Where what is wished cannot be.
PassLimits WithoutWishes(PassLimits limits) {
  limits.pass_rows = limits.max_rows;
  return limits;
}

// Fills passes greedily with groups in order of their prompts, so that groups with common prefixes
// meet. What a group adds is bounded by its own rows less the prompt tokens that the group before
// it has brought.
std::vector<PlannedPass> FillPasses(std::vector<GroupRange> groups, const PassLimits& limits) {
  std::stable_sort(groups.begin(), groups.end(), [](const GroupRange& a, const GroupRange& b) {
    return std::lexicographical_compare(a.prompt.begin(), a.prompt.end(), b.prompt.begin(),
                                        b.prompt.end());
  });
  std::vector<PlannedPass> passes;
  int64_t rows = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    const GroupRange& group = groups[i];
    const bool follows = i > 0 && limits.share_prefixes;
    const int64_t added = group.rows - (follows ? CommonPrompt(groups[i - 1], group) : 0);
    if (passes.empty() || rows + added > limits.pass_rows) {
      passes.push_back({.batches = {{}}});
      rows = group.rows;
    } else {
      rows += added;
    }
    for (size_t s = group.begin; s < group.end; ++s) {
      passes.back().batches[0].push_back(static_cast<int32_t>(s));
    }
  }
  for (PlannedPass& pass : passes) std::sort(pass.batches[0].begin(), pass.batches[0].end());
  return passes;
}

std::vector<int32_t> SamplesOf(const std::vector<GroupRange>& groups) {
  std::vector<int32_t> indices;
  for (const GroupRange& group : groups) {
    for (size_t s = group.begin; s < group.end; ++s) indices.push_back(static_cast<int32_t>(s));
  }
  return indices;
}

// Whether the group's prompt can start from what generation kept.
bool CanUseKept(const TrainGroup& group, const PassLimits& limits) {
  const KeptPrompt* kept = group.kept_prompt.get();
  return kept != nullptr && kept->complete() && kept->version == limits.version &&
         kept->tokens == group.prompt;
}

// Adds passes of their own for groups whose prompts were kept; returns the others.
std::vector<GroupRange> PlanKept(const RequestPlan& plan, const std::vector<TrainGroup>& groups,
                                 const PassLimits& limits, std::vector<PlannedPass>& passes) {
  std::vector<GroupRange> others;
  for (const GroupRange& range : MeasureGroups(plan, groups, limits)) {
    const TrainGroup& group = groups[range.index];
    absl::StatusOr<PlannedPass> pass = absl::NotFoundError("no kept prompt");
    if (CanUseKept(group, limits)) {
      pass = CutGroup(plan, range, limits);
      if (!pass.ok()) pass = CutGroup(plan, range, WithoutWishes(limits));
    }
    if (pass.ok()) {
      pass->kept = group.kept_prompt;
      passes.push_back(*std::move(pass));
    } else {
      others.push_back(range);
    }
  }
  return others;
}

// Adds passes of their own for groups whose prompts are in the cache; returns the others.
std::vector<GroupRange> PlanCached(const RequestPlan& plan, const std::vector<TrainGroup>& groups,
                                   const PassLimits& limits, std::vector<PlannedPass>& passes) {
  std::vector<GroupRange> others;
  for (const GroupRange& range : MeasureGroups(plan, groups, limits)) {
    const CachedPrefix& cached = groups[range.index].cached;
    std::optional<std::vector<std::vector<int32_t>>> batches;
    if (cached.tokens > 0 && limits.share_prefixes) {
      batches = CutSamples(plan, range, cached.tokens, limits.pass_rows);
      if (!batches.has_value()) batches = CutSamples(plan, range, cached.tokens, limits.max_rows);
    }
    if (batches.has_value()) {
      passes.push_back({.cached = &cached, .batches = *std::move(batches)});
    } else {
      others.push_back(range);
    }
  }
  return others;
}

absl::Status PlanPasses(const RequestPlan& plan, const std::vector<GroupRange>& others,
                        const PassLimits& limits, std::vector<PlannedPass>& passes) {
  std::vector<int32_t> samples = SamplesOf(others);
  if (NumRows(plan.Sequences(samples), limits.share_prefixes) <= limits.pass_rows) {
    if (!samples.empty()) passes.push_back({.batches = {std::move(samples)}});
    return absl::OkStatus();
  }
  std::vector<GroupRange> small;
  for (const GroupRange& group : others) {
    if (group.rows <= limits.pass_rows) {
      small.push_back(group);
      continue;
    }
    absl::StatusOr<PlannedPass> pass = CutGroup(plan, group, limits);
    if (!pass.ok() && group.rows <= limits.max_rows) {
      pass = PlannedPass{.batches = {SamplesOf({group})}};
    } else if (!pass.ok()) {
      pass = CutGroup(plan, group, WithoutWishes(limits));
    }
    RETURN_IF_ERROR(pass.status());
    passes.push_back(*std::move(pass));
  }
  for (PlannedPass& pass : FillPasses(std::move(small), limits)) {
    passes.push_back(std::move(pass));
  }
  return absl::OkStatus();
}

// only_masked_in: tokens without loss need no log-prob.
void ListSamples(const std::vector<TrainGroup>& groups, bool only_masked_in, RequestPlan& plan) {
  for (const TrainGroup& group : groups) {
    for (const TrainSample& sample : group.samples) {
      plan.samples.push_back(&sample);
      plan.sequences.push_back({.prompt = group.prompt, .response = sample.tokens});
      if (only_masked_in) plan.sequences.back().wanted = sample.loss_mask;
    }
  }
}

int64_t NumTokensWithLoss(const TrainSample& sample) {
  if (sample.loss_mask.empty()) return static_cast<int64_t>(sample.tokens.size());
  return std::count_if(sample.loss_mask.begin(), sample.loss_mask.end(),
                       [](float mask) { return mask != 0; });
}

}  // namespace

std::vector<TokenSequence> RequestPlan::Sequences(const std::vector<int32_t>& indices) const {
  std::vector<TokenSequence> result;
  result.reserve(indices.size());
  for (const int32_t s : indices) result.push_back(sequences[s]);
  return result;
}

absl::StatusOr<RequestPlan> PlanTraining(const ModelConfig& config, const PassLimits& limits,
                                         const ForwardBackwardRequest& request) {
  RETURN_IF_ERROR(ValidateRequest(config, request));
  RequestPlan plan;
  ListSamples(request.groups, /*only_masked_in=*/!request.return_logprobs, plan);
  for (const TrainGroup& group : request.groups) {
    for (std::vector<double>& a : SampleAdvantages(request.loss, group)) {
      plan.advantages.push_back(std::move(a));
    }
  }
  for (const TrainSample* sample : plan.samples) {
    plan.counts.Add(*sample);
    plan.with_loss += NumTokensWithLoss(*sample);
  }
  ASSIGN_OR_RETURN(plan.passes, PlanTrainingPasses(plan, request.groups, limits));
  return plan;
}

absl::StatusOr<RequestPlan> PlanScoring(const ModelConfig& config, const PassLimits& limits,
                                        const std::vector<TrainGroup>& groups) {
  RETURN_IF_ERROR(ValidateTokens(config, groups));
  RequestPlan plan;
  ListSamples(groups, /*only_masked_in=*/false, plan);
  ASSIGN_OR_RETURN(plan.passes, PlanScoringPasses(plan, groups, limits));
  return plan;
}

absl::StatusOr<std::vector<PlannedPass>> PlanTrainingPasses(const RequestPlan& plan,
                                                            const std::vector<TrainGroup>& groups,
                                                            const PassLimits& limits) {
  std::vector<PlannedPass> passes;
  RETURN_IF_ERROR(PlanPasses(plan, PlanKept(plan, groups, limits, passes), limits, passes));
  return passes;
}

absl::StatusOr<std::vector<PlannedPass>> PlanScoringPasses(const RequestPlan& plan,
                                                           const std::vector<TrainGroup>& groups,
                                                           const PassLimits& limits) {
  std::vector<PlannedPass> passes;
  RETURN_IF_ERROR(PlanPasses(plan, PlanCached(plan, groups, limits, passes), limits, passes));
  return passes;
}

}  // namespace coppice
