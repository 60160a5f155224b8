// NaiveCache: what RadixCache promises, said block by block without a tree: a map from a token
// prefix to the state of its last block. Slow and obvious; the property test runs both side by
// side. Where the promise leaves a choice (which evictable leaf goes, where a partial lease ends)
// the model is told what the cache chose and checks that it was allowed.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "cache/radix_cache.h"

namespace coppice {

class NaiveCache {
 public:
  using Tokens = std::vector<int32_t>;

  // One block of one path. `scope` is the namespace, or one of its own for blocks that stay
  // private.
  struct Entry {
    int ns = 0;
    int scope = 0;
    Tokens prefix;  // up to the end of the block
    BlockId block{-1};
    bool committed = false;
    int leases = 0;
    int producer = 0;  // lease; 0 = none
    int priority = 0;
    absl::Duration expires_at;
    int64_t last_use = 0;
  };
  // A lease: the entries of its path. `id` > 0.
  struct Path {
    int id = 0;
    int ns = 0;
    std::vector<Entry*> entries;
    Tokens tokens() const { return entries.empty() ? Tokens() : entries.back()->prefix; }
  };

  NaiveCache(int64_t num_blocks, int block_tokens, int num_namespaces)
      : bt_(block_tokens), num_blocks_(num_blocks), retired_(num_namespaces) {}

  int64_t cached_only() const {
    return Count([](const Entry& e) { return e.leases == 0; });
  }
  int64_t leased() const {
    return Count([](const Entry& e) { return e.leases > 0; }) + owned_;
  }
  int64_t free() const { return num_blocks_ - static_cast<int64_t>(entries_.size()) - owned_; }

  // The longest prefix, leased by `path`.
  void Match(int ns, const Tokens& tokens, Path& path) {
    path.ns = ns;
    if (retired_[ns]) return;
    for (size_t end = bt_; end <= tokens.size(); end += bt_) {
      Entry* entry = Find(ns, Head(tokens, end));
      if (entry == nullptr) break;
      Lease(path, entry);
    }
  }
  // Leading tokens that are leased already.
  int64_t LeasedTokens(int ns, const Tokens& tokens) {
    int64_t n = 0;
    while (!retired_[ns] && n + bt_ <= static_cast<int64_t>(tokens.size())) {
      const Entry* entry = Find(ns, Head(tokens, n + bt_));
      if (entry == nullptr || entry->leases == 0) break;
      n += bt_;
    }
    return n;
  }
  // Most tokens that a committed block behind `path` shares with `tokens`, fewer than a block.
  int PartialTokens(const Path& path, const Tokens& tokens) const {
    if (retired_[path.ns]) return 0;
    const Tokens before = path.tokens();
    int best = 0;
    for (const auto& [key, e] : entries_) {
      if (e.scope != path.ns || !e.committed || e.prefix.size() != before.size() + bt_) continue;
      best = std::max(best, SharedBehind(before, e.prefix, tokens));
    }
    return best;
  }
  int SharedBehind(const Tokens& before, const Tokens& a, const Tokens& b) const {
    const size_t limit = std::min(a.size(), b.size());
    size_t n = 0;
    while (n < limit && a[n] == b[n]) ++n;
    return n < before.size() ? 0 : static_cast<int>(n - before.size());
  }
  void Lease(Path& path, Entry* entry) {
    path.entries.push_back(entry);
    ++entry->leases;
  }
  void Release(Path& path) {
    ++tick_;
    for (Entry* e : path.entries) {
      if (e->producer == path.id) e->producer = 0;
      if (--e->leases > 0) continue;
      e->last_use = tick_;
      if (!e->committed || IsPrivate(*e)) Erase(e);
    }
    path.entries.clear();
  }

  void Take(int64_t n) { owned_ += n; }
  void Return(int64_t n) { owned_ -= n; }

  // Blocks given are owned. Fills `switched` with the twins' blocks by index; returns how many
  // entered the shared tree.
  int64_t Publish(Path& path, const Tokens& tokens, const std::vector<BlockId>& blocks,
                  const PublishOptions& options) {
    int scope = path.entries.empty() ? path.ns : path.entries.back()->scope;
    int64_t entered = 0;
    bool twins = true;
    const size_t begin = path.entries.size();
    owned_ -= static_cast<int64_t>(blocks.size());
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Tokens prefix = Head(tokens, (begin + i + 1) * bt_);
      Entry* twin = twins ? Find(scope, prefix) : nullptr;
      if (twin != nullptr && twin->committed) {
        Lease(path, twin);
        continue;
      }
      if (twin != nullptr) scope = next_scope_++;  // in flight: from here on private
      twins = false;
      Entry& e = entries_[{scope, prefix}];
      e.ns = path.ns;
      e.scope = scope;
      e.prefix = prefix;
      e.block = blocks[i];
      e.producer = path.id;
      e.priority = options.priority;
      Lease(path, &e);
      entered += IsPrivate(e) ? 0 : 1;
    }
    for (Entry* e : path.entries) {
      e->priority = std::max(e->priority, options.priority);
      e->expires_at =
          std::max(e->expires_at, options.expires_at.value_or(absl::InfiniteDuration()));
    }
    Commit(path, options.committed_tokens);
    return entered;
  }
  void Commit(Path& path, int64_t num_tokens) {
    for (size_t i = 0; i < path.entries.size() && (i + 1) * bt_ <= static_cast<size_t>(num_tokens);
         ++i) {
      Entry& e = *path.entries[i];
      if (!e.committed && !IsPrivate(e)) last_storer_[e.prefix] = e.ns;
      e.committed = true;
    }
  }
  int64_t CommittedTokens(const Path& path) const {
    int64_t n = 0;
    while (n < static_cast<int64_t>(path.entries.size()) && path.entries[n]->committed) ++n;
    return n * bt_;
  }
  // The lease that computes the first uncommitted block, or 0.
  int Producer(const Path& path) const {
    for (const Entry* e : path.entries) {
      if (!e->committed) return e->producer;
    }
    return 0;
  }
  bool TakeOver(Path& path) {
    bool taken = false;
    for (Entry* e : path.entries) {
      if (e->committed || e->producer != 0) continue;
      e->producer = path.id;
      taken = true;
    }
    return taken;
  }

  // The cache handed out `blocks` and made room for them by evicting. Empty = allowed, else what is
  // wrong.
  std::string Evicted(const std::vector<BlockId>& blocks) {
    const std::set<BlockId> gone(blocks.begin(), blocks.end());
    using Value = std::tuple<bool, int, int64_t>;
    const auto value = [this](const Entry& e) {
      return Value(!retired_[e.ns], e.priority, e.last_use);
    };
    const std::set<Tokens> none;
    Value dearest_gone{false, INT_MIN, 0}, cheapest_leaf{true, INT_MAX, 0};
    std::vector<Entry*> victims;
    for (auto& [key, e] : entries_) {
      if (gone.count(e.block) > 0) {
        if (e.leases > 0) return "a leased block was evicted";
        dearest_gone = std::max(dearest_gone, value(e));
        victims.push_back(&e);
      } else if (e.leases == 0 && !HasChild(e)) {
        cheapest_leaf = std::min(cheapest_leaf, value(e));
      }
    }
    if (!victims.empty() && dearest_gone > cheapest_leaf) return "a cheaper leaf was kept";
    for (Entry* e : victims) Erase(e);
    for (const auto& [key, e] : entries_) {
      if (e.prefix.size() > static_cast<size_t>(bt_) && !IsPrivate(e) &&
          Find(e.scope, Head(e.prefix, e.prefix.size() - bt_)) == nullptr) {
        return "a head went before its tail";
      }
    }
    return "";
  }
  int64_t Expire(absl::Duration now) {
    return EraseIf([now](const Entry& e) { return e.leases == 0 && e.expires_at <= now; });
  }
  int64_t Flush(int ns) {  // -1 = all
    return EraseIf([ns](const Entry& e) { return e.leases == 0 && (ns < 0 || e.ns == ns); });
  }
  void Retire(int ns) {
    retired_[ns] = Count([ns](const Entry& e) { return e.ns == ns; }) > 0;
  }
  bool retired(int ns) const { return retired_[ns]; }

  // The namespace that stored `prefix` last, or -1.
  int LastStorer(const Tokens& prefix) const {
    const auto it = last_storer_.find(prefix);
    return it == last_storer_.end() ? -1 : it->second;
  }
  // The tokens that a block of the tree holds, from position 0; null if it is in none.
  const Entry* Holder(BlockId block) const {
    for (const auto& [key, e] : entries_) {
      if (e.block == block) return &e;
    }
    return nullptr;
  }
  Entry* Find(int scope, const Tokens& prefix) {
    const auto it = entries_.find({scope, prefix});
    return it == entries_.end() ? nullptr : &it->second;
  }

 private:
  static Tokens Head(const Tokens& t, size_t n) { return Tokens(t.begin(), t.begin() + n); }
  bool IsPrivate(const Entry& e) const { return e.scope >= kFirstPrivateScope; }
  bool HasChild(const Entry& e) const {
    const auto next =
        entries_.upper_bound({e.scope, e.prefix});  // a longer prefix sorts right behind
    return next != entries_.end() && next->first.first == e.scope &&
           next->second.prefix.size() > e.prefix.size() &&
           std::equal(e.prefix.begin(), e.prefix.end(), next->second.prefix.begin());
  }
  template <typename Predicate>
  int64_t Count(Predicate predicate) const {
    return std::count_if(entries_.begin(), entries_.end(),
                         [&](const auto& item) { return predicate(item.second); });
  }
  void Erase(Entry* e) {
    const int ns = e->ns;
    entries_.erase({e->scope, Tokens(e->prefix)});
    if (retired_[ns]) Retire(ns);  // forgotten with its last block
  }
  template <typename Predicate>
  int64_t EraseIf(Predicate predicate) {
    std::vector<Entry*> victims;
    for (auto& [key, e] : entries_) {
      if (predicate(e)) victims.push_back(&e);
    }
    for (Entry* e : victims) Erase(e);
    return static_cast<int64_t>(victims.size());
  }

  static constexpr int kFirstPrivateScope = 1000;
  const int bt_;
  const int64_t num_blocks_;
  int64_t owned_ = 0;
  int64_t tick_ = 0;
  int next_scope_ = kFirstPrivateScope;
  std::vector<bool> retired_;
  std::map<std::pair<int, Tokens>, Entry> entries_;
  std::map<Tokens, int> last_storer_;  // all namespaces of the test belong to one tenant
};

}  // namespace coppice
