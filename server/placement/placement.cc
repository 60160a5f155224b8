#include "server/placement/placement.h"

#include <algorithm>

#include "server/placement/prefix_hash.h"

namespace coppice {
namespace {

// A completion counts one part in so many of the running mean.
constexpr double kMeanOver = 64;

bool Contains(absl::Span<const ReplicaId> ids, ReplicaId id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

const char* Name(PlacedBy by) {
  constexpr const char* kNames[kNumPlacedBy] = {"home", "session", "prefix", "balance"};
  return kNames[static_cast<int>(by)];
}

ReplicaId Placement::Add(absl::string_view name) {
  const ReplicaId id{next_id_++};
  replicas_.push_back({.id = id,
                       .name_hash = HashName(name, 0),
                       .joined = ++tick_,
                       .index = PrefixIndex(options_.index_blocks)});
  return id;
}

void Placement::Remove(ReplicaId id) {
  std::erase_if(replicas_, [id](const Replica& replica) { return replica.id == id; });
}

void Placement::SetServing(ReplicaId id, bool serving) {
  Replica* replica = Find(id);
  if (replica == nullptr || replica->serving == serving) return;
  replica->serving = serving;
  if (serving) replica->joined = ++tick_;
}

void Placement::ForgetPrefixes(ReplicaId id) {
  if (Replica* replica = Find(id)) replica->index.Clear();
}

void Placement::SetCacheTokens(ReplicaId id, int64_t tokens) {
  if (Replica* replica = Find(id)) replica->index.SetCapacity(tokens / kPrefixTokens);
}

std::optional<Placed> Placement::Place(const PlacementRequest& request) {
  const Replica* home = HomeOf(request.prefix_hash, request.except);
  if (home == nullptr) return std::nullopt;
  const std::vector<Offer> offers = Offers(request, *home);
  const auto costs_less = [](const Offer& a, const Offer& b) {
    return a.within_bound != b.within_bound ? a.within_bound : a.cost < b.cost;
  };
  const Offer* chosen = &*std::min_element(offers.begin(), offers.end(), costs_less);
  bool by_session = false;
  const Offer* preferred = Preferred(request, *home, offers, &by_session);
  const double margin = by_session ? options_.session_margin : options_.home_margin;
  const bool keep = preferred->within_bound && preferred->cost <= chosen->cost + margin;
  if (keep) chosen = preferred;

  PlacedBy by = PlacedBy::kBalance;
  if (chosen->replica == home) {
    by = PlacedBy::kHome;
  } else if (chosen->hit_tokens > preferred->hit_tokens) {
    by = PlacedBy::kPrefix;
  }
  if (keep && by_session) by = PlacedBy::kSession;

  Replica& replica = *chosen->replica;
  const Placed placed{.replica = replica.id,
                      .home = home->id,
                      .by = by,
                      .predicted_hit_tokens = chosen->hit_tokens,
                      .load = replica.load,
                      .charge = chosen->charge};
  replica.load += chosen->charge;
  replica.index.Touch(request.blocks, ++tick_);
  if (request.session != 0) sessions_.Put(request.session, {replica.id, tick_});
  return placed;
}

std::vector<Placement::Offer> Placement::Offers(const PlacementRequest& request,
                                                const Replica& home) {
  std::vector<Offer> offers;
  double total = 0, least = 0;
  for (Replica& replica : replicas_) {
    if (!replica.serving || Contains(request.except, replica.id)) continue;
    Offer offer{.replica = &replica};
    const int64_t since = &replica == &home ? 0 : home.joined;
    offer.hit_tokens =
        std::min(replica.index.Match(request.blocks, since) * kPrefixTokens, request.prompt_tokens);
    const double prefill =
        options_.prefill_token_cost * static_cast<double>(request.prompt_tokens - offer.hit_tokens);
    offer.cost = prefill + options_.load_cost * replica.load;
    offer.charge = prefill + expected_decode(request);
    least = offers.empty() ? replica.load : std::min(least, replica.load);
    total += replica.load;
    offers.push_back(offer);
  }
  for (Offer& offer : offers) {
    const double mean = (total + offer.charge) / static_cast<double>(offers.size());
    const double limit = std::max(options_.free_load, options_.load_bound * mean);
    offer.within_bound =
        offer.replica->load + offer.charge <= limit || offer.replica->load <= least;
  }
  return offers;
}

const Placement::Offer* Placement::Preferred(const PlacementRequest& request, const Replica& home,
                                             const std::vector<Offer>& offers,
                                             bool* by_session) const {
  const Session* session = request.session == 0 ? nullptr : sessions_.Find(request.session);
  const Offer* at_home = nullptr;
  for (const Offer& offer : offers) {
    if (session != nullptr && offer.replica->id == session->replica &&
        (offer.replica == &home || session->tick >= home.joined)) {
      *by_session = true;
      return &offer;
    }
    if (offer.replica == &home) at_home = &offer;
  }
  return at_home;
}

void Placement::Withdraw(const Placed& placed, absl::Span<const uint64_t> blocks) {
  Replica* replica = Find(placed.replica);
  if (replica != nullptr) {
    replica->index.Forget(blocks, placed.predicted_hit_tokens / kPrefixTokens);
  }
}

void Placement::Finish(const Placed& placed, double completion_tokens) {
  if (completion_tokens >= 0) {
    expected_completion_ += (completion_tokens - expected_completion_) / kMeanOver;
  }
  Replica* replica = Find(placed.replica);
  if (replica != nullptr) replica->load = std::max(0.0, replica->load - placed.charge);
}

double Placement::Load(ReplicaId id) const {
  const Replica* replica = Find(id);
  return replica == nullptr ? 0 : replica->load;
}

std::optional<ReplicaId> Placement::Home(uint64_t prefix_hash) const {
  const Replica* home = HomeOf(prefix_hash, {});
  return home == nullptr ? std::nullopt : std::optional<ReplicaId>(home->id);
}

Placement::Replica* Placement::Find(ReplicaId id) {
  return const_cast<Replica*>(std::as_const(*this).Find(id));
}

const Placement::Replica* Placement::Find(ReplicaId id) const {
  for (const Replica& replica : replicas_) {
    if (replica.id == id) return &replica;
  }
  return nullptr;
}

const Placement::Replica* Placement::HomeOf(uint64_t prefix_hash,
                                            absl::Span<const ReplicaId> except) const {
  const Replica* home = nullptr;
  uint64_t highest = 0;
  for (const Replica& replica : replicas_) {
    if (!replica.serving || Contains(except, replica.id)) continue;
    const uint64_t score = MixHash(prefix_hash, replica.name_hash);
    if (home != nullptr && score <= highest) continue;
    home = &replica;
    highest = score;
  }
  return home;
}

double Placement::expected_decode(const PlacementRequest& request) const {
  const double each = std::min(static_cast<double>(request.max_tokens), expected_completion_);
  return static_cast<double>(request.n) * each;
}

}  // namespace coppice
