#include "server/engine/scheduler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <utility>

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

// The waiting requests in the order of rule 3. Within a priority and a tenant that order is fixed,
// so each such line is sorted once; which tenant's line moves next depends on what its tenant has
// been served meanwhile. Cost: O(n log n) to build, O(tenants) a request taken.
class WaitingLines {
 public:
  WaitingLines(const std::vector<WaitingView>& waiting, std::map<std::string, double> tokens)
      : tokens_(std::move(tokens)) {
    for (const WaitingView& w : waiting) {
      Line& line = lines_[-Priority(w)][w.tenant];
      line.served = &tokens_[w.tenant];
      line.requests.emplace_back(Score(w), w.id, &w);
    }
    for (auto& [priority, tenants] : lines_) {
      for (auto& [tenant, line] : tenants) std::sort(line.requests.begin(), line.requests.end());
    }
  }

  bool empty() const { return lines_.empty(); }

  const WaitingView& TakeFirst() {
    std::map<std::string, Line>& tenants = lines_.begin()->second;
    const auto first = std::min_element(
        tenants.begin(), tenants.end(),
        [](const auto& a, const auto& b) { return Rank(a.second) < Rank(b.second); });
    Line& line = first->second;
    const WaitingView& taken = *std::get<const WaitingView*>(line.requests[line.taken++]);
    if (line.taken == line.requests.size()) tenants.erase(first);
    if (tenants.empty()) lines_.erase(lines_.begin());
    return taken;
  }

  void Charge(const WaitingView& w) {
    tokens_[w.tenant] += static_cast<double>(w.uncached_tokens + w.samples);
  }

 private:
  using Entry = std::tuple<double, RequestId, const WaitingView*>;  // score first
  struct Line {
    double* served = nullptr;
    std::vector<Entry> requests;
    size_t taken = 0;
  };

  static std::tuple<double, Entry> Rank(const Line& line) {
    return {*line.served, line.requests[line.taken]};
  }
  static int64_t Priority(const WaitingView& w) {
    return w.priority + static_cast<int64_t>(absl::FDivDuration(w.waited, kPriorityAgeing));
  }
  static double Score(const WaitingView& w) {
    return static_cast<double>(w.uncached_tokens) -
           kAgeingTokensPerSecond * absl::ToDoubleSeconds(w.waited);
  }

  std::map<std::string, double> tokens_;
  std::map<int64_t, std::map<std::string, Line>> lines_;  // by descending priority, by tenant
};

void AdmitWaiting(const AdmissionInput& input, Room& room, AdmissionPlan& plan) {
  WaitingLines lines(input.waiting, input.tenant_tokens);
  while (!lines.empty() && room.samples > 0) {
    const WaitingView& w = lines.TakeFirst();
    if (w.samples > room.samples || !room.Fits(w.blocks)) {
      if (w.waited >= kMaxPassedOver) return;
      continue;
    }
    room.Take(w.blocks, w.samples);
    lines.Charge(w);
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
