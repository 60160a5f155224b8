// Placement: chooses the replica of a request. Bookkeeping only: no I/O, no clock, no randomness;
// the same calls give the same answers.
//
// Owner: whoever routes, under its own lock; not thread-safe.
//
// The rule, in decode tokens (what one sample takes for one token is the unit of load and time):
//   home       rendezvous hashing of the request's prefix hash over the replicas that serve. A
//              replica that joins or leaves moves only the keys that it wins or held.
//   preferred  where the session is, else home.
//   cost(r)    prefill_token_cost * (prompt tokens that r is not believed to hold)
//              + load_cost * load(r)
//   bound      r may take the request if load(r) + charge <= max(free_load, load_bound * mean load
//              with the request), or if no replica has less load.
//   choice     the cheapest of those within the bound; the preferred one if it is among them and
//              costs at most its margin more.
// The charge of a request is n * expected decode tokens + prefill_token_cost * missing prompt
// tokens, from Place to Finish. The n samples of a call are one charge on one replica: a group is
// never split.
//
// A replica that joins or comes back takes its keys: what other replicas were sent before that does
// not keep a key away from its home. It costs one prefill a key.
//
// Sources: consistent hashing with bounded loads, Mirrokni et al., arXiv 1608.01350; rendezvous
// hashing, Thaler and Ravishankar 1998; cost of a match against load as in Preble, arXiv
// 2407.00023.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/placement/lru_map.h"
#include "server/placement/prefix_index.h"

namespace coppice {

enum class ReplicaId : int64_t {};  // never reused

// Why a replica was chosen.
enum class PlacedBy { kHome, kSession, kPrefix, kBalance };
inline constexpr int kNumPlacedBy = 4;
const char* Name(PlacedBy by);

struct PlacementRequest {
  uint64_t prefix_hash = 0;           // PrefixHash
  absl::Span<const uint64_t> blocks;  // BlockHashes
  int64_t prompt_tokens = 0;
  uint64_t session = 0;                // HashName of tenant and session id; 0 = none
  int64_t n = 1;                       // samples
  int64_t max_tokens = 0;              // of each sample
  absl::Span<const ReplicaId> except;  // tried before
};

// A placed request; give it back to Finish.
struct Placed {
  ReplicaId replica{0};
  ReplicaId home{0};
  PlacedBy by = PlacedBy::kHome;
  int64_t predicted_hit_tokens = 0;
  double load = 0;    // of the replica, before
  double charge = 0;  // added to it
};

class Placement {
 public:
  struct Options {
    double load_bound = 1.25;
    // Load that a replica may always have: thirty samples or so do not wait for each other.
    double free_load = 8192;
    // Of a decode token. A prompt token takes less than a hundredth of its time, but delays all
    // samples of its replica.
    double prefill_token_cost = 0.03;
    double load_cost = 1.0 / 256;  // a token of load delays the others by so much
    double session_margin = 128;   // cost that a session bears before it moves
    double home_margin = 4;        // cost that a home bears before a request goes elsewhere
    int64_t index_blocks = 32768;  // per replica, until SetCacheTokens: 8 M tokens
    int64_t max_sessions = 65536;
    double first_completion = 256;  // expected decode tokens before any completion was seen
  };

  explicit Placement(Options options) : options_(options), sessions_(options.max_sessions) {}

  // ---- Membership. A replica joins serving. Its name decides its keys.
  ReplicaId Add(absl::string_view name);
  void Remove(ReplicaId id);
  // An ejected replica gets nothing but keeps its name and what it is believed to hold.
  void SetServing(ReplicaId id, bool serving);
  // The replica's cache is empty: it restarted, or its policy changed.
  void ForgetPrefixes(ReplicaId id);
  // What the replica's cache can hold.
  void SetCacheTokens(ReplicaId id, int64_t tokens);

  // ---- Requests
  // Absent if no replica serves but those in `except`. O(replicas * log blocks + blocks).
  std::optional<Placed> Place(const PlacementRequest& request);
  // The replica did not compute the request: it holds no more of its blocks than before.
  void Withdraw(const Placed& placed, absl::Span<const uint64_t> blocks);
  // The request has ended, however. `completion_tokens`: mean of its samples if they all finished,
  // to learn from; else negative.
  void Finish(const Placed& placed, double completion_tokens);

  // Decode tokens that are open on the replica; 0 if unknown.
  double Load(ReplicaId id) const;
  // The first choice for a key by hash alone; absent if nothing serves.
  std::optional<ReplicaId> Home(uint64_t prefix_hash) const;
  double expected_completion() const { return expected_completion_; }

 private:
  struct Replica {
    ReplicaId id;
    uint64_t name_hash;
    bool serving = true;
    int64_t joined = 0;  // tick
    double load = 0;
    PrefixIndex index;
  };
  struct Session {
    ReplicaId replica;
    int64_t tick;
  };
  // One replica's offer for one request.
  struct Offer {
    Replica* replica = nullptr;
    int64_t hit_tokens = 0;
    double cost = 0;
    double charge = 0;
    bool within_bound = false;
  };

  Replica* Find(ReplicaId id);
  const Replica* Find(ReplicaId id) const;
  const Replica* HomeOf(uint64_t prefix_hash, absl::Span<const ReplicaId> except) const;
  std::vector<Offer> Offers(const PlacementRequest& request, const Replica& home);
  const Offer* Preferred(const PlacementRequest& request, const Replica& home,
                         const std::vector<Offer>& offers, bool* by_session) const;
  double expected_decode(const PlacementRequest& request) const;

  const Options options_;
  std::vector<Replica> replicas_;
  LruMap<Session> sessions_;
  int64_t tick_ = 0;
  int64_t next_id_ = 1;
  double expected_completion_ = options_.first_completion;
};

}  // namespace coppice
