// Scheduler: who runs next. Two pure functions of counts and ages; nothing here knows tokens,
// blocks' contents or threads. A step first decides who holds KV (PlanAdmission), the engine
// carries that out on the cache, then divides the rows of the step (PlanRows).
//
// Rules, in this order:
//   1. Running samples come first. If the pool cannot give each the block that it needs now, the
//   youngest of the lowest
//      priority are retracted until it can; nobody is admitted in that step.
//   2. Retracted samples resume, oldest first, before anything new is admitted.
//   3. Among waiting requests: higher priority, raised by one for every kPriorityAgeing of waiting;
//   then the tenant that
//      was served the fewest tokens; then the fewest uncached tokens less kAgeingTokensPerSecond of
//      waiting.
//   4. A request that does not fit is passed over until it has waited kMaxPassedOver; then nobody
//   overtakes it.
//   5. When nothing holds KV, the first in order runs whatever the estimates say: each sample alone
//   fits the pool
//      (validated at submission), so something always progresses.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "kernels/base/ids.h"

namespace coppice {

inline constexpr absl::Duration kPriorityAgeing = absl::Seconds(10);
inline constexpr double kAgeingTokensPerSecond = 1000;
inline constexpr absl::Duration kMaxPassedOver = absl::Seconds(5);

struct SampleKey {
  RequestId request{0};
  int32_t sample = 0;
  friend auto operator<=>(const SampleKey&, const SampleKey&) = default;
};

// A request in the queue.
struct WaitingView {
  RequestId id{0};
  std::string tenant;
  int32_t priority = 0;
  absl::Duration waited;
  int64_t uncached_tokens = 0;  // estimate
  int64_t blocks = 0;           // estimate of what it takes from the available ones
  int64_t samples = 1;
};

// Samples of a running request that hold no KV: retracted, to be prefilled again.
struct IdleView {
  SampleKey key;
  int32_t priority = 0;
  int64_t blocks = 0;
};

// A running sample, or a prefill named by the oldest sample that waits for it.
struct HoldingView {
  SampleKey key;
  int32_t priority = 0;
  int64_t freeable_blocks = 0;  // estimate of what retracting gives back
  bool needs_block = false;     // to run in this step
};

struct AdmissionInput {
  std::vector<WaitingView> waiting;
  std::vector<IdleView> idle;
  std::vector<HoldingView> holding;
  std::map<std::string, double> tenant_tokens;  // served so far
  int64_t available_blocks = 0;
  int64_t free_samples = 0;  // samples that may still start
  bool open = true;          // false: nothing new starts (policy gate)
};

struct AdmissionPlan {
  std::vector<SampleKey> retract;  // youngest first
  std::vector<SampleKey> resume;   // oldest first
  std::vector<RequestId> admit;    // in this order
};

AdmissionPlan PlanAdmission(const AdmissionInput& input);

struct DecodeView {
  SampleKey key;
  uint64_t last_step = 0;  // in which it ran
};

struct PrefillView {
  uint64_t stem = 0;
  int32_t priority = 0;
  int64_t first_row = 0;  // position of the next token to run
  int64_t rows = 0;       // that remain
};

struct RowInput {
  std::vector<DecodeView> decode;
  std::vector<PrefillView> prefill;
  int64_t max_rows = 0;
  int64_t block_tokens = 0;
};

struct PrefillRows {
  uint64_t stem = 0;
  int64_t rows = 0;
};

struct RowPlan {
  std::vector<SampleKey> decode;  // ascending
  std::vector<PrefillRows> prefill;
  bool empty() const { return decode.empty() && prefill.empty(); }
};

// One row for each decoding sample (least recently run first if they are too many), the rest to
// prefills by priority and age. Decoding leaves a quarter of the rows to prefills that wait. Chunks
// end at block boundaries where they can.
RowPlan PlanRows(const RowInput& input);

// Tokens served by tenant. A tenant that was away starts level with the least served of those
// present, so that absence earns no credit (virtual token counter: Sheng et al., "Fairness in
// serving large language models", OSDI'24).
class TenantMeter {
 public:
  // The tenant has work from now on, `present` of the others have too.
  void Enter(const std::string& tenant, const std::vector<std::string>& present);
  void Charge(const std::string& tenant, double tokens) { tokens_[tenant] += tokens; }
  const std::map<std::string, double>& tokens() const { return tokens_; }

 private:
  std::map<std::string, double> tokens_;  // at most kMaxAbsentTenants more than are present
};

inline constexpr size_t kMaxAbsentTenants = 1024;

}  // namespace coppice
