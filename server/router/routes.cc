#include "server/router/routes.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "coppice/v1/admin.pb.h"
#include "coppice/v1/cache.pb.h"
#include "coppice/v1/generation.pb.h"
#include "kernels/base/status_macros.h"
#include "server/placement/prefix_hash.h"
#include "server/router/message_bytes.h"

namespace coppice {
namespace {

// More blocks are not hashed: 64 k tokens decide.
constexpr int64_t kMaxBlocks = 256;
// GenerateEvent's tags: (field number << 3) | 2.
constexpr uint8_t kStartedTag = 0x0a, kGroupTag = 0x22;
constexpr char kAbort[] = "/coppice.v1.Generation/Abort";

// What PrefixHash and BlockHashes need, in one piece. The suffix continues a prompt of tokens.
class PromptBytes {
 public:
  PromptBytes(const v1::Prompt& prompt, absl::string_view tenant, absl::string_view key) {
    view_.name_space = tenant;
    view_.cache_key = key;
    if (prompt.has_text()) {
      view_.text = {prompt.text().data(), prompt.text().size()};
      num_tokens_ = static_cast<int64_t>(prompt.text().size()) / 4 + prompt.suffix().ids_size();
      return;
    }
    const auto& ids = prompt.tokens().ids();
    const auto& suffix = prompt.suffix().ids();
    num_tokens_ = ids.size() + suffix.size();
    view_.token_ids = {ids.data(), static_cast<size_t>(ids.size())};
    if (suffix.empty()) return;
    joined_.assign(ids.begin(), ids.end());
    joined_.insert(joined_.end(), suffix.begin(), suffix.end());
    view_.token_ids = joined_;
  }
  PromptBytes(const PromptBytes&) = delete;
  PromptBytes& operator=(const PromptBytes&) = delete;

  const PromptView& view() const { return view_; }
  int64_t num_tokens() const { return num_tokens_; }

 private:
  PromptView view_;
  std::vector<int32_t> joined_;
  int64_t num_tokens_ = 0;
};

uint64_t SessionHash(absl::string_view tenant, absl::string_view session_id) {
  return session_id.empty() ? 0 : HashName(session_id, HashName(tenant, 1));
}

PlacementFacts FactsOf(const PromptBytes& prompt, std::optional<uint64_t> prefix_header) {
  PlacementFacts facts;
  facts.prefix_hash = prefix_header ? *prefix_header : PrefixHash(prompt.view());
  facts.blocks = BlockHashes(prompt.view(), kMaxBlocks);
  facts.prompt_tokens = prompt.num_tokens();
  return facts;
}

absl::StatusOr<PlacementFacts> GenerateFacts(const grpc::ByteBuffer& request,
                                             absl::string_view tenant,
                                             std::optional<uint64_t> prefix_header) {
  ASSIGN_OR_RETURN(const v1::GenerateRequest generate, Parse<v1::GenerateRequest>(request));
  const PromptBytes prompt(generate.prompt(), tenant, generate.cache().key());
  PlacementFacts facts = FactsOf(prompt, prefix_header);
  facts.session = SessionHash(tenant, generate.session_id());
  facts.n = generate.has_n() ? std::max(1, generate.n()) : 1;
  facts.max_tokens = std::max(0, generate.sampling().max_tokens());
  facts.retain = generate.retain();
  facts.explain = generate.explain_placement();
  return facts;
}

absl::StatusOr<PlacementFacts> WarmFacts(const grpc::ByteBuffer& request, absl::string_view tenant,
                                         std::optional<uint64_t> prefix_header) {
  ASSIGN_OR_RETURN(const v1::WarmRequest warm, Parse<v1::WarmRequest>(request));
  const PromptBytes prompt(warm.prompt(), tenant, warm.cache().key());
  PlacementFacts facts = FactsOf(prompt, prefix_header);
  facts.session = SessionHash(tenant, warm.session_id());
  return facts;
}

absl::StatusOr<PlacementFacts> ScoreFacts(const grpc::ByteBuffer& request, absl::string_view tenant,
                                          std::optional<uint64_t> prefix_header) {
  ASSIGN_OR_RETURN(const v1::ScoreRequest score, Parse<v1::ScoreRequest>(request));
  v1::Prompt first;
  if (score.groups_size() > 0) *first.mutable_tokens() = score.groups(0).prompt();
  const PromptBytes prompt(first, tenant, "");
  PlacementFacts facts = FactsOf(prompt, prefix_header);
  for (const v1::ScoreGroup& group : score.groups()) {
    for (const v1::TokenIds& response : group.responses()) {
      facts.prompt_tokens += response.ids_size();
    }
  }
  return facts;
}

void Add(const v1::CacheStats& from, v1::CacheStats& to) {
  to.set_total_blocks(to.total_blocks() + from.total_blocks());
  to.set_free_blocks(to.free_blocks() + from.free_blocks());
  to.set_leased_blocks(to.leased_blocks() + from.leased_blocks());
  to.set_cached_only_blocks(to.cached_only_blocks() + from.cached_only_blocks());
  to.set_num_nodes(to.num_nodes() + from.num_nodes());
  to.set_num_namespaces(std::max(to.num_namespaces(), from.num_namespaces()));
  to.set_evicted_blocks(to.evicted_blocks() + from.evicted_blocks());
  to.set_published_blocks(to.published_blocks() + from.published_blocks());
  to.set_queried_tokens(to.queried_tokens() + from.queried_tokens());
  to.set_hit_tokens(to.hit_tokens() + from.hit_tokens());
}

void Add(const v1::GetStatsResponse& from, v1::GetStatsResponse& to) {
  Add(from.stats(), *to.mutable_stats());
}
void Add(const v1::FlushResponse& from, v1::FlushResponse& to) {
  to.set_blocks_freed(to.blocks_freed() + from.blocks_freed());
}
void Add(const v1::AbortResponse& from, v1::AbortResponse& to) {
  to.set_aborted(to.aborted() + from.aborted());
}
void Add(const v1::PauseResponse& from, v1::PauseResponse& to) {
  to.set_requests(to.requests() + from.requests());
}
void Add(const v1::ResumeResponse& from, v1::ResumeResponse& to) {
  to.set_requests(to.requests() + from.requests());
}
void Add(const v1::DrainResponse& from, v1::DrainResponse& to) {
  to.set_requests(to.requests() + from.requests());
}
// Serving if any replica is.
void Add(const v1::GetStatusResponse& from, v1::GetStatusResponse& to) {
  if (from.state() == v1::SERVING_STATE_SERVING) to.set_state(from.state());
  to.set_queued_requests(to.queued_requests() + from.queued_requests());
  to.set_running_requests(to.running_requests() + from.running_requests());
  to.set_running_samples(to.running_samples() + from.running_samples());
  to.set_rollouts(to.rollouts() + from.rollouts());
  Add(from.cache(), *to.mutable_cache());
}

template <typename Response>
absl::StatusOr<grpc::ByteBuffer> MergeAs(const std::vector<grpc::ByteBuffer>& answers) {
  Response merged;
  for (size_t i = 0; i < answers.size(); ++i) {
    absl::StatusOr<Response> answer = Parse<Response>(answers[i]);
    if (!answer.ok()) {
      return absl::InternalError(absl::StrCat("answers not merged: want ", merged.GetTypeName(),
                                              ", got bytes that are none; update the replicas"));
    }
    if (i == 0) {
      merged = *std::move(answer);
    } else {
      Add(*answer, merged);
    }
  }
  grpc::ByteBuffer buffer;
  Serialize(merged, buffer);
  return buffer;
}

struct FanOut {
  const char* method;
  absl::StatusOr<grpc::ByteBuffer> (*merge)(const std::vector<grpc::ByteBuffer>&);
};
constexpr FanOut kFanOuts[] = {
    {kAbort, MergeAs<v1::AbortResponse>},
    {"/coppice.v1.Cache/GetStats", MergeAs<v1::GetStatsResponse>},
    {"/coppice.v1.Cache/Flush", MergeAs<v1::FlushResponse>},
    {"/coppice.v1.Admin/GetStatus", MergeAs<v1::GetStatusResponse>},
    {"/coppice.v1.Admin/Pause", MergeAs<v1::PauseResponse>},
    {"/coppice.v1.Admin/Resume", MergeAs<v1::ResumeResponse>},
    {"/coppice.v1.Admin/Drain", MergeAs<v1::DrainResponse>},
};

const FanOut* FindFanOut(absl::string_view method) {
  for (const FanOut& fan_out : kFanOuts) {
    if (method == fan_out.method) return &fan_out;
  }
  return nullptr;
}

bool StartsWith(absl::string_view text, absl::string_view prefix) {
  return text.substr(0, prefix.size()) == prefix;
}

v1::Placement::Reason ReasonOf(PlacedBy by) {
  switch (by) {
    case PlacedBy::kHome:
      return v1::Placement::HOME;
    case PlacedBy::kSession:
      return v1::Placement::SESSION;
    case PlacedBy::kPrefix:
      return v1::Placement::PREFIX;
    case PlacedBy::kBalance:
      return v1::Placement::BALANCE;
  }
  return v1::Placement::REASON_UNSPECIFIED;
}

// The first byte of a message: the tag of its first field; 0 if it is empty.
uint8_t FirstByte(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  if (!buffer.Dump(&slices).ok()) return 0;
  for (const grpc::Slice& slice : slices) {
    if (slice.size() > 0) return *slice.begin();
  }
  return 0;
}

}  // namespace

Route RouteOf(absl::string_view method) {
  if (method == "/coppice.v1.Generation/Generate") return Route::kGenerate;
  if (method == "/coppice.v1.Generation/Warm") return Route::kWarm;
  if (method == "/coppice.v1.Generation/Score") return Route::kScore;
  if (StartsWith(method, "/coppice.v1.Generation/")) return Route::kGenerationOther;
  if (StartsWith(method, "/coppice.v1.Training/")) return Route::kTraining;
  if (!IsFanOut(method)) return Route::kUnknown;
  return StartsWith(method, "/coppice.v1.Cache/") ? Route::kCache : Route::kAdmin;
}

bool IsFanOut(absl::string_view method) { return FindFanOut(method) != nullptr; }

bool TakesLong(absl::string_view method) {
  return RouteOf(method) == Route::kTraining || method == "/coppice.v1.Generation/Score" ||
         method == "/coppice.v1.Admin/Pause" || method == "/coppice.v1.Admin/Drain";
}

absl::StatusOr<PlacementFacts> ReadPlacementFacts(Route route, const grpc::ByteBuffer& request,
                                                  absl::string_view tenant,
                                                  std::optional<uint64_t> prefix_header) {
  if (route == Route::kWarm) return WarmFacts(request, tenant, prefix_header);
  if (route == Route::kScore) return ScoreFacts(request, tenant, prefix_header);
  return GenerateFacts(request, tenant, prefix_header);
}

EventFacts ReadEvent(const grpc::ByteBuffer& event) {
  EventFacts facts;
  const uint8_t tag = FirstByte(event);
  if (tag != kStartedTag && tag != kGroupTag) return facts;
  absl::StatusOr<v1::GenerateEvent> parsed = Parse<v1::GenerateEvent>(event);
  if (!parsed.ok()) return facts;
  if (parsed->has_started()) {
    const v1::Usage& usage = parsed->started().prompt_usage();
    facts.started = true;
    facts.prompt_tokens = usage.prompt_tokens();
    facts.hit_tokens = usage.cached_device_tokens() + usage.cached_host_tokens() +
                       usage.cached_disk_tokens() + usage.cached_remote_tokens() +
                       usage.joined_tokens();
  }
  if (parsed->has_group()) {
    facts.group = true;
    facts.completion_tokens = parsed->group().usage().completion_tokens();
    facts.rollout_id = parsed->group().rollout_id();
  }
  return facts;
}

void AddToGroup(const std::string& rollout_id, const std::optional<Explanation>& explanation,
                grpc::ByteBuffer& event) {
  if (rollout_id.empty() && !explanation) return;
  v1::GenerateEvent addition;
  addition.mutable_group()->set_rollout_id(rollout_id);
  if (explanation) {
    v1::Placement* placement = addition.mutable_group()->mutable_placement();
    placement->set_replica(explanation->replica);
    placement->set_reason(ReasonOf(explanation->by));
    placement->set_home(explanation->home);
    placement->set_prefix_hash(PrefixHashToHeader(explanation->prefix_hash));
    placement->set_predicted_hit_tokens(explanation->predicted_hit_tokens);
    placement->set_load(explanation->load);
    placement->set_charge(explanation->charge);
    placement->set_attempts(explanation->attempts);
  }
  Append(addition, event);
}

absl::StatusOr<grpc::ByteBuffer> Merge(absl::string_view method,
                                       const std::vector<grpc::ByteBuffer>& answers) {
  return FindFanOut(method)->merge(answers);
}

}  // namespace coppice
