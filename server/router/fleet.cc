#include "server/router/fleet.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/security/credentials.h"
#include "kernels/base/log.h"

namespace coppice {
namespace {

// A stream's own buffer on the way in, per call: what a slow reader can make the router hold.
constexpr int kStreamWindowBytes = 64 << 10;
constexpr int kMaxReconnectMs = 1000;
// Ends the calls of a host that vanished without a word, also once its replica has left the list.
constexpr int kKeepaliveMs = 30'000, kKeepaliveTimeoutMs = 10'000;

std::shared_ptr<grpc::Channel> Connect(const std::string& target) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(-1);
  args.SetMaxSendMessageSize(-1);
  args.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  args.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kStreamWindowBytes);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // a stream may send nothing for long
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kMaxReconnectMs);
  // A replica that left and came back must not inherit the old one's back-off.
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), args);
}

}  // namespace

Fleet::~Fleet() {
  absl::MutexLock lock(&mutex_);
  replicas_.clear();
}

const char* Fleet::Name(State state) {
  constexpr const char* kNames[] = {"joining",   "serving", "paused",
                                    "not_ready", "ejected", "mismatched"};
  return kNames[static_cast<int>(state)];
}

void Fleet::SetMembers(const std::vector<ReplicaAddress>& members) {
  absl::MutexLock lock(&mutex_);
  std::erase_if(replicas_, [&](const Replica& replica) {
    mutex_.AssertHeld();  // the analysis looks at a lambda for itself
    if (std::find(members.begin(), members.end(), replica.address) != members.end()) return false;
    LOG(INFO) << "replica_left replica=" << replica.address.name
              << " target=" << replica.address.target << " open_requests=" << replica.open.size();
    placement_.Remove(replica.id);
    return true;
  });
  if (leader_name_.empty() && !members.empty()) {
    const auto by_name = [](const auto& a, const auto& b) { return a.name < b.name; };
    leader_name_ = std::min_element(members.begin(), members.end(), by_name)->name;
  }
  for (const ReplicaAddress& member : members) {
    const auto known = [&](const Replica& replica) { return replica.address == member; };
    if (std::any_of(replicas_.begin(), replicas_.end(), known)) continue;
    Replica replica{.address = member, .id = placement_.Add(member.name)};
    placement_.SetServing(replica.id, false);
    replica.channel = Connect(member.target);
    replica.metrics = std::make_unique<RouterMetrics::Replica>(metrics_, member.name);
    replicas_.push_back(std::move(replica));
    LOG(INFO) << "replica_found replica=" << member.name << " target=" << member.target
              << " leader=" << leader_name_;
  }
  std::sort(replicas_.begin(), replicas_.end(),
            [](const Replica& a, const Replica& b) { return a.address.name < b.address.name; });
  ChooseTakers();
  CountStates();
}

std::vector<ReplicaTarget> Fleet::Members() const {
  absl::MutexLock lock(&mutex_);
  std::vector<ReplicaTarget> targets;
  for (const Replica& replica : replicas_) {
    targets.push_back({replica.id, replica.address.name, replica.channel});
  }
  return targets;
}

void Fleet::Update(ReplicaId id, const ReplicaReport& report) {
  Attempts to_cancel;
  {
    absl::MutexLock lock(&mutex_);
    Replica* replica = Find(id);
    if (replica == nullptr) return;
    const bool failed = report.health == ReplicaReport::Health::kFailed;
    replica->failures = failed ? replica->failures + 1 : 0;
    if (report.facts) LearnFacts(*replica, *report.facts);
    if (report.facts && replica == FindLeader()) leader_epoch_ = report.policy_epoch;
    if (report.facts) replica->late = false;
    Enter(*replica, Judge(*replica, report), report.error, to_cancel);
    ChooseTakers();
    CountStates();
  }
  Cancel(to_cancel, OpenAttempt::Cancelled::kEjected);
}

void Fleet::LearnFacts(Replica& replica, const ReplicaReport::Facts& facts) {
  const bool restarted = replica.facts && facts.uptime < replica.facts->uptime;
  const bool updated = replica.facts && facts.policy_version != replica.facts->policy_version;
  if (restarted || updated) placement_.ForgetPrefixes(replica.id);
  if (!replica.facts || restarted) placement_.SetCacheTokens(replica.id, facts.cache_tokens);
  if (!replica.facts || restarted || updated) {
    LOG(INFO) << "replica_facts replica=" << replica.address.name
              << " policy_version=" << facts.policy_version << " model=\"" << facts.model
              << "\" cache_tokens=" << facts.cache_tokens;
  }
  replica.facts = facts;
  replica.metrics->policy_version.Set(static_cast<double>(facts.policy_version));
}

Fleet::State Fleet::Judge(const Replica& replica, const ReplicaReport& report) const {
  if (report.health == ReplicaReport::Health::kFailed) {
    return replica.failures >= options_.eject_after ? State::kEjected : replica.state;
  }
  if (replica.late && !MayHoldEngine(replica)) return State::kEjected;
  const bool serving = report.health == ReplicaReport::Health::kServing;
  if (!replica.facts) return serving ? State::kJoining : State::kNotReady;
  if (!serving && replica.facts->draining) return State::kNotReady;
  const Replica* leader = FindLeader();
  const bool differs = leader != nullptr && leader->facts.has_value() &&
                       leader->facts->model != replica.facts->model;
  if (differs) return State::kMismatched;
  return serving ? State::kServing : State::kPaused;
}

void Fleet::Enter(Replica& replica, State state, const std::string& why, Attempts& to_cancel) {
  const State before = replica.state;
  if (state == before) return;
  replica.state = state;
  const std::string& name = replica.address.name;
  switch (state) {
    case State::kJoining:
    case State::kNotReady:
      LOG(INFO) << "replica_not_ready replica=" << name << " was=" << Name(before);
      break;
    case State::kPaused:
      LOG(INFO) << "replica_paused replica=" << name << " was=" << Name(before);
      break;
    case State::kServing:
      LOG(INFO) << (before == State::kEjected ? "replica_restored" : "replica_joined")
                << " replica=" << name << " was=" << Name(before);
      break;
    case State::kMismatched:
      LOG(WARNING) << "replica_mismatch kind=model replica=" << name << " want the model of "
                   << leader_name_ << ", got " << replica.facts->model
                   << "; it gets no requests until it serves the same";
      break;
    case State::kEjected:
      LOG(WARNING) << "replica_ejected replica=" << name << " was=" << Name(before)
                   << " failures=" << replica.failures << " open_requests=" << replica.open.size()
                   << " last_error=\"" << why << '"';
      if (before == State::kServing) {
        (replica.late ? metrics_.ejections_first_byte : metrics_.ejections_health).Increment();
      }
      to_cancel.assign(replica.open.begin(), replica.open.end());
      break;
  }
}

void Fleet::ChooseTakers() {
  const auto serves = [](const Replica& replica) { return replica.state == State::kServing; };
  const bool any = std::any_of(replicas_.begin(), replicas_.end(), serves);
  takers_ = any ? State::kServing : State::kPaused;
  for (const Replica& replica : replicas_) {
    placement_.SetServing(replica.id, replica.state == takers_);
  }
}

void Fleet::CountStates() {
  const Replica* leader = FindLeader();
  int64_t serving = 0, ejected = 0, mismatched = 0, policies = 0;
  for (Replica& replica : replicas_) {
    serving += replica.state == State::kServing;
    ejected += replica.state == State::kEjected;
    mismatched += replica.state == State::kMismatched;
    policies += leader != nullptr && leader->facts && replica.facts &&
                leader->facts->policy_version != replica.facts->policy_version;
    replica.metrics->up.Set(replica.state == State::kServing ? 1 : 0);
  }
  metrics_.replicas_serving.Set(static_cast<double>(serving));
  metrics_.replicas_ejected.Set(static_cast<double>(ejected));
  metrics_.replicas_mismatched.Set(static_cast<double>(mismatched));
  metrics_.model_mismatches.Set(static_cast<double>(mismatched));
  const bool changed = metrics_.policy_mismatches.Value() != static_cast<double>(policies);
  metrics_.policy_mismatches.Set(static_cast<double>(policies));
  if (!changed || policies == 0) return;
  LOG(WARNING) << "replica_mismatch kind=policy_version replicas=" << policies
               << " want the leader's " << leader->facts->policy_version
               << "; their answers come from another policy: load the leader's checkpoint there";
}

void Fleet::CancelLate() {
  if (options_.first_byte_timeout == absl::ZeroDuration()) return;
  const absl::Duration now = clock_.Now();
  const absl::Duration latest = now - options_.first_byte_timeout;
  Attempts late;
  {
    absl::MutexLock lock(&mutex_);
    for (Replica& replica : replicas_) {
      for (const auto& attempt : replica.open) {
        // What waits for Resume is not late.
        if (replica.state == State::kPaused) attempt->started = now;
        if (attempt->takes_long || attempt->first_byte || attempt->started > latest) continue;
        late.push_back(attempt);
        replica.late = !MayHoldEngine(replica);
        LOG(WARNING) << "first_byte_late replica=" << replica.address.name
                     << " timeout=" << absl::FormatDuration(options_.first_byte_timeout);
      }
    }
  }
  Cancel(late, OpenAttempt::Cancelled::kFirstByteLate);
}

absl::Status Fleet::CheckModels() const {
  absl::MutexLock lock(&mutex_);
  const Replica* first = nullptr;
  for (const Replica& replica : replicas_) {
    if (!replica.facts) continue;
    if (first == nullptr) first = &replica;
    if (replica.facts->model == first->facts->model) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("replicas not usable: want one model, got ", first->facts->model, " on ",
                     first->address.name, " and ", replica.facts->model, " on ",
                     replica.address.name, "; start all replicas with the same --model"));
  }
  return absl::OkStatus();
}

absl::Status Fleet::CheckLeader() const {
  absl::MutexLock lock(&mutex_);
  if (FindLeader() != nullptr) return absl::OkStatus();
  const auto name = [](std::string* out, const Replica& replica) {
    out->append(replica.address.name);
  };
  return absl::InvalidArgumentError(absl::StrCat("leader not usable: want one of ",
                                                 absl::StrJoin(replicas_, ", ", name), ", got ",
                                                 leader_name_, "; change --leader or --replicas"));
}

absl::StatusOr<Fleet::Choice> Fleet::Place(const PlacementRequest& request) {
  absl::MutexLock lock(&mutex_);
  return PlaceLocked(request);
}

absl::StatusOr<Fleet::Choice> Fleet::PlaceRetained(PlacementRequest request) {
  absl::MutexLock lock(&mutex_);
  std::vector<ReplicaId> except(request.except.begin(), request.except.end());
  for (const Replica& replica : replicas_) {
    if (!HasLeadersPolicy(replica)) except.push_back(replica.id);
  }
  request.except = except;
  absl::StatusOr<Choice> choice = PlaceLocked(request);
  return choice.ok() ? choice : LeaderMissing();
}

bool Fleet::HasLeadersPolicy(const Replica& replica) const {
  const Replica* leader = FindLeader();
  if (&replica == leader) return true;
  const bool known =
      leader != nullptr && leader->facts && policy_calls_ == 0 && leader_epoch_ == policy_epoch_;
  return known && replica.facts && replica.facts->policy_version == leader->facts->policy_version;
}

absl::StatusOr<Fleet::Choice> Fleet::PlaceLocked(const PlacementRequest& request) {
  const std::optional<Placed> placed = placement_.Place(request);
  if (!placed) return NoneServes();
  const Replica* replica = Find(placed->replica);
  ShowLoad(placed->replica);
  metrics_.placements[static_cast<int>(placed->by)]->Increment();
  return Choice{{replica->id, replica->address.name, replica->channel},
                *placed,
                Find(placed->home)->address.name};
}

void Fleet::Withdraw(const Placed& placed, absl::Span<const uint64_t> blocks) {
  absl::MutexLock lock(&mutex_);
  placement_.Withdraw(placed, blocks);
}

void Fleet::Finish(const Placed& placed, double completion_tokens) {
  absl::MutexLock lock(&mutex_);
  placement_.Finish(placed, completion_tokens);
  ShowLoad(placed.replica);
}

absl::StatusOr<ReplicaTarget> Fleet::Leader() const {
  absl::MutexLock lock(&mutex_);
  const Replica* leader = FindLeader();
  // A paused leader still trains.
  if (leader != nullptr && Answers(*leader)) {
    return ReplicaTarget{leader->id, leader->address.name, leader->channel};
  }
  return LeaderMissing();
}

absl::Status Fleet::LeaderMissing() const {
  const Replica* leader = FindLeader();
  return absl::UnavailableError(
      absl::StrCat("leader not reachable: want ", leader_name_, " serving, got ",
                   leader == nullptr ? "no such replica" : Name(leader->state),
                   "; training waits for it, or restart the router with --leader of one of those "
                   "that are left"));
}

std::string Fleet::leader_name() const {
  absl::MutexLock lock(&mutex_);
  return leader_name_;
}

absl::StatusOr<ReplicaTarget> Fleet::Named(const std::string& name) const {
  absl::MutexLock lock(&mutex_);
  const Replica* replica = FindByName(name);
  if (replica != nullptr && Answers(*replica)) {
    return ReplicaTarget{replica->id, replica->address.name, replica->channel};
  }
  return absl::UnavailableError(absl::StrCat(
      "replica not reachable: want ", name, " answering health checks, got ",
      replica == nullptr ? "no such replica" : Name(replica->state), "; retry when it is back"));
}

void Fleet::PolicyCallBegan() {
  absl::MutexLock lock(&mutex_);
  ++policy_calls_;
}

void Fleet::PolicyCallEnded() {
  absl::MutexLock lock(&mutex_);
  --policy_calls_;
  ++policy_epoch_;
}

uint64_t Fleet::policy_epoch() const {
  absl::MutexLock lock(&mutex_);
  return policy_epoch_;
}

absl::StatusOr<ReplicaTarget> Fleet::Any(absl::Span<const ReplicaId> except) const {
  absl::MutexLock lock(&mutex_);
  const Replica* least = nullptr;
  for (const Replica& replica : replicas_) {
    if (replica.state != takers_) continue;
    if (std::find(except.begin(), except.end(), replica.id) != except.end()) continue;
    if (least == nullptr || replica.open.size() < least->open.size()) least = &replica;
  }
  if (least == nullptr) return NoneServes();
  return ReplicaTarget{least->id, least->address.name, least->channel};
}

std::vector<ReplicaTarget> Fleet::Reachable() const {
  absl::MutexLock lock(&mutex_);
  std::vector<ReplicaTarget> targets;
  for (const Replica& replica : replicas_) {
    if (!Answers(replica)) continue;
    targets.push_back({replica.id, replica.address.name, replica.channel});
  }
  return targets;
}

void Fleet::Opened(ReplicaId id, const std::shared_ptr<OpenAttempt>& attempt) {
  attempt->started = clock_.Now();
  {
    absl::MutexLock lock(&mutex_);
    Replica* replica = Find(id);
    if (replica == nullptr) return;
    replica->open.insert(attempt);
    replica->metrics->open_requests.Set(static_cast<double>(replica->open.size()));
    if (replica->state != State::kEjected) return;
  }
  Cancel({attempt}, OpenAttempt::Cancelled::kEjected);
}

void Fleet::Closed(ReplicaId id, const std::shared_ptr<OpenAttempt>& attempt) {
  absl::MutexLock lock(&mutex_);
  Replica* replica = Find(id);
  if (replica == nullptr) return;
  replica->open.erase(attempt);
  replica->metrics->open_requests.Set(static_cast<double>(replica->open.size()));
}

int64_t Fleet::num_serving() const {
  absl::MutexLock lock(&mutex_);
  return std::count_if(replicas_.begin(), replicas_.end(),
                       [](const Replica& replica) { return replica.state == State::kServing; });
}

bool Fleet::AnyReachable() const {
  absl::MutexLock lock(&mutex_);
  return std::any_of(replicas_.begin(), replicas_.end(), Answers);
}

bool Fleet::Answers(const Replica& replica) {
  return replica.state == State::kServing || replica.state == State::kPaused ||
         replica.state == State::kNotReady;
}

bool Fleet::MayHoldEngine(const Replica& replica) {
  return std::any_of(replica.open.begin(), replica.open.end(),
                     [](const auto& attempt) { return attempt->takes_long; });
}

Fleet::Replica* Fleet::Find(ReplicaId id) {
  for (Replica& replica : replicas_) {
    if (replica.id == id) return &replica;
  }
  return nullptr;
}

const Fleet::Replica* Fleet::FindByName(const std::string& name) const {
  for (const Replica& replica : replicas_) {
    if (replica.address.name == name) return &replica;
  }
  return nullptr;
}

const Fleet::Replica* Fleet::FindLeader() const { return FindByName(leader_name_); }

void Fleet::ShowLoad(ReplicaId id) {
  const Replica* replica = Find(id);
  if (replica != nullptr) replica->metrics->load_tokens.Set(std::round(placement_.Load(id)));
}

absl::Status Fleet::NoneServes() const {
  const auto describe = [](std::string* out, const Replica& replica) {
    absl::StrAppend(out, replica.address.name, " ", Name(replica.state));
  };
  return absl::UnavailableError(
      absl::StrCat("no replica takes the request: want one that serves, got ",
                   replicas_.empty() ? "none" : absl::StrJoin(replicas_, ", ", describe),
                   "; retry later, or look at the replicas' logs"));
}

void Fleet::Cancel(const Attempts& attempts, OpenAttempt::Cancelled why) {
  for (const auto& attempt : attempts) {
    attempt->cancelled = why;
    attempt->context.TryCancel();
  }
}

}  // namespace coppice
