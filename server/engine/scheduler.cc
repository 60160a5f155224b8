#include "server/engine/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

namespace coppice {
namespace {

// Oldest of the highest priority first.
template <typename View>
std::vector<View> BySeniority(std::vector<View> views) {
  std::sort(views.begin(), views.end(), [](const View& a, const View& b) {
    return std::tuple(-int64_t{a.priority}, a.key) < std::tuple(-int64_t{b.priority}, b.key);
  });
  return views;
}

// What the running samples still lack after the available blocks; retracts the youngest until it is
// 0 or one is left.
void RetractYoungest(const std::vector<HoldingView>& seniority, int64_t needed, int64_t available,
                     AdmissionPlan& plan) {
  for (size_t left = seniority.size(); needed > available && left > 1; --left) {
    const HoldingView& youngest = seniority[left - 1];
    plan.retract.push_back(youngest.key);
    available += youngest.freeable_blocks;
    needed -= youngest.needs_block ? 1 : 0;
  }
}

// The order among waiting requests; smaller runs earlier.
std::tuple<int64_t, double, double, RequestId> Rank(const WaitingView& w,
                                                    const std::map<std::string, double>& tokens) {
  const int64_t priority =
      w.priority + static_cast<int64_t>(absl::FDivDuration(w.waited, kPriorityAgeing));
  const auto served = tokens.find(w.tenant);
  const double score = static_cast<double>(w.uncached_tokens) -
                       kAgeingTokensPerSecond * absl::ToDoubleSeconds(w.waited);
  return {-priority, served == tokens.end() ? 0 : served->second, score, w.id};
}

// Blocks and samples that may still be handed out.
struct Room {
  int64_t blocks = 0;
  int64_t samples = 0;
  bool forced = false;  // nothing holds KV: the first taker need not fit the blocks

  bool Fits(int64_t want_blocks) const { return forced || want_blocks <= blocks; }
  void Take(int64_t want_blocks, int64_t want_samples) {
    blocks -= want_blocks;
    samples -= want_samples;
    forced = false;
  }
};

// True if every idle sample resumes.
bool ResumeIdle(const AdmissionInput& input, Room& room, AdmissionPlan& plan) {
  for (const IdleView& idle : BySeniority(input.idle)) {
    if (!room.Fits(idle.blocks)) return false;
    room.Take(idle.blocks, 0);
    plan.resume.push_back(idle.key);
  }
  return true;
}

void AdmitWaiting(const AdmissionInput& input, Room& room, AdmissionPlan& plan) {
  std::map<std::string, double> tokens = input.tenant_tokens;
  std::vector<const WaitingView*> waiting;
  for (const WaitingView& w : input.waiting) waiting.push_back(&w);
  while (!waiting.empty() && room.samples > 0) {
    const auto first = std::min_element(waiting.begin(), waiting.end(),
                                        [&](const WaitingView* a, const WaitingView* b) {
                                          return Rank(*a, tokens) < Rank(*b, tokens);
                                        });
    const WaitingView& w = **first;
    waiting.erase(first);
    if (w.samples > room.samples || !room.Fits(w.blocks)) {
      if (w.waited >= kMaxPassedOver) return;
      continue;
    }
    room.Take(w.blocks, w.samples);
    tokens[w.tenant] += static_cast<double>(w.uncached_tokens + w.samples);
    plan.admit.push_back(w.id);
  }
}

}  // namespace

AdmissionPlan PlanAdmission(const AdmissionInput& input) {
  AdmissionPlan plan;
  const std::vector<HoldingView> seniority = BySeniority(input.holding);
  const int64_t needed = std::count_if(seniority.begin(), seniority.end(),
                                       [](const HoldingView& h) { return h.needs_block; });
  RetractYoungest(seniority, needed, input.available_blocks, plan);
  if (!plan.retract.empty()) return plan;

  // Besides the blocks needed now, each running sample keeps one for the near future, or admission
  // would thrash.
  Room room;
  room.blocks = input.available_blocks - needed - static_cast<int64_t>(seniority.size());
  room.samples = input.free_samples;
  room.forced = seniority.empty();
  if (ResumeIdle(input, room, plan) && input.open) AdmitWaiting(input, room, plan);
  return plan;
}

RowPlan PlanRows(const RowInput& input) {
  RowPlan plan;
  std::vector<DecodeView> decode = input.decode;
  std::sort(decode.begin(), decode.end(), [](const DecodeView& a, const DecodeView& b) {
    return std::tuple(a.last_step, a.key) < std::tuple(b.last_step, b.key);
  });
  const int64_t reserved = input.prefill.empty() ? 0 : input.max_rows / 4;
  const int64_t decode_rows =
      std::min<int64_t>(static_cast<int64_t>(decode.size()), input.max_rows - reserved);
  for (int64_t i = 0; i < decode_rows; ++i) plan.decode.push_back(decode[i].key);
  std::sort(plan.decode.begin(), plan.decode.end());

  std::vector<PrefillView> prefill = input.prefill;
  std::sort(prefill.begin(), prefill.end(), [](const PrefillView& a, const PrefillView& b) {
    return std::tuple(-int64_t{a.priority}, a.stem) < std::tuple(-int64_t{b.priority}, b.stem);
  });
  int64_t left = input.max_rows - decode_rows;
  for (const PrefillView& p : prefill) {
    int64_t end = p.first_row + std::min(p.rows, left);
    const int64_t whole = end / input.block_tokens * input.block_tokens;
    if (end < p.first_row + p.rows && whole > p.first_row) end = whole;
    if (end == p.first_row) break;
    plan.prefill.push_back({p.stem, end - p.first_row});
    left -= end - p.first_row;
  }
  return plan;
}

void TenantMeter::Enter(const std::string& tenant, const std::vector<std::string>& present) {
  double least = std::numeric_limits<double>::infinity();
  for (const std::string& other : present) {
    if (other != tenant) least = std::min(least, tokens_[other]);
  }
  double& own = tokens_[tenant];
  if (std::isfinite(least)) own = std::max(own, least);
  if (tokens_.size() <= present.size() + kMaxAbsentTenants) return;
  std::erase_if(tokens_, [&](const auto& entry) {
    return entry.first != tenant &&
           std::find(present.begin(), present.end(), entry.first) == present.end();
  });
}

}  // namespace coppice
