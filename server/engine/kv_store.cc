#include "server/engine/kv_store.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

constexpr size_t kMaxNamespaces = 4096;  // remembered

// The row that is run whatever the cache holds: the last token's, for its logits, which no cache
// keeps.
int64_t LastNeededRow(const Stem& stem) { return stem.num_tokens() - (stem.wants_logits ? 1 : 0); }

}  // namespace

absl::StatusOr<std::unique_ptr<KvStore>> KvStore::Create(const Options& options,
                                                         const Decoder& decoder) {
  ASSIGN_OR_RETURN(KvPool pool, KvPool::Create(decoder.config(), options.num_blocks,
                                               options.block_tokens, decoder.ops()));
  return std::unique_ptr<KvStore>(new KvStore(options, decoder, std::move(pool)));
}

KvStore::KvStore(const Options& options, const Decoder& decoder, KvPool pool)
    : options_(options),
      decoder_(decoder),
      pool_(std::move(pool)),
      cache_({.num_blocks = options.num_blocks, .block_tokens = options.block_tokens}) {
  const ModelConfig& config = decoder.config();
  kv_layout_ =
      absl::StrCat(Name(decoder.ops().Info().compute_dtype), " blocks of ", options.block_tokens,
                   " tokens, ", config.kv_heads, "x", config.head_dim);
}

void KvStore::SetPolicy(PolicyVersion version, bool replaced) {
  if (version == version_ && !replaced) return;
  version_ = version;
  if (replaced) ++replaced_;
  namespaces_.clear();
  cache_.RetireAll();
}

const Namespace& KvStore::NamespaceOf(const std::string& tenant_salt) const {
  if (namespaces_.size() >= kMaxNamespaces) namespaces_.clear();
  const auto [it, is_new] = namespaces_.try_emplace(tenant_salt);
  if (is_new) {
    it->second = MakeNamespace({.model = absl::StrCat(options_.model, "#", replaced_),
                                .policy_version = version_,
                                .kv_layout = kv_layout_,
                                .tenant_salt = tenant_salt});
  }
  return it->second;
}

PeekResult KvStore::Peek(const Group& group, absl::Duration now) const {
  if (group.request.cache_skip_read) return {};
  return cache_.Peek(NamespaceOf(group.request.tenant_salt), group.request.prompt, now);
}

Lease KvStore::LeaseCached(const std::string& tenant_salt, const std::vector<int32_t>& prompt,
                           absl::Duration now, CachedPrefix& cached) {
  MatchResult match =
      cache_.Match(NamespaceOf(tenant_salt), prompt,
                   {.max_tokens = static_cast<int64_t>(prompt.size()) - 1, .now = now});
  const int64_t blocks = match.committed_tokens / block_tokens();
  cached = {.pool = &pool_, .blocks = {}, .tokens = blocks * block_tokens()};
  const std::vector<BlockId> held = match.lease.blocks();
  for (int64_t b = 0; b < blocks; ++b) cached.blocks.push_back(Raw(held[b]));
  return std::move(match.lease);
}

PublishOptions KvStore::PublishAs(const GenerateRequest& request, int64_t committed,
                                  absl::Duration now) const {
  PublishOptions publish{.committed_tokens = committed, .priority = request.cache_priority};
  if (request.cache_ttl.has_value()) publish.expires_at = now + *request.cache_ttl;
  return publish;
}

// Gives up the partial block if it is what stands in the way.
BlockSet KvStore::AllocateOrEmpty(int64_t n, MatchResult& match) {
  absl::StatusOr<BlockSet> blocks = cache_.Allocate(n);
  if (!blocks.ok() && match.partial_tokens > 0) {
    match.partial_tokens = 0;
    match.partial_lease.Release();
    blocks = cache_.Allocate(n);
  }
  return blocks.ok() ? std::move(blocks).value() : BlockSet();
}

absl::StatusOr<std::shared_ptr<Stem>> KvStore::StartStem(const Group& group,
                                                         std::vector<int32_t> tokens,
                                                         absl::Duration now) {
  const GenerateRequest& request = group.request;
  auto stem = std::make_shared<Stem>();
  stem->ns = NamespaceOf(request.tenant_salt);
  stem->tokens = std::move(tokens);
  stem->priority = request.priority;
  stem->joinable = !request.cache_skip_read && !request.cache_skip_write;
  stem->wants_logits = !group.is_warm();
  stem->id = next_stem_++;

  MatchResult match = cache_.Match(
      stem->ns, stem->tokens,
      {.owner = RequestId{stem->id}, .skip_read = request.cache_skip_read, .now = now});
  const int64_t matched = match.lease.num_tokens();
  const int64_t blocks =
      (stem->num_tokens() + block_tokens() - 1) / block_tokens() - matched / block_tokens();
  stem->own = AllocateOrEmpty(blocks, match);
  if (stem->own.size() < blocks) return std::shared_ptr<Stem>();

  stem->ready_tokens = match.committed_tokens;
  if (match.partial_tokens > 0 && match.committed_tokens == matched && blocks > 0) {
    RETURN_IF_ERROR(CopyBlock({match.partial_block}, {stem->own.ids()[0]}));
    stem->ready_tokens += match.partial_tokens;
  }
  stem->matched_tokens = matched;
  stem->lease = std::move(match.lease);
  stem->miss_reason = match.miss_reason;
  stem->next_row = std::min(stem->ready_tokens, LastNeededRow(*stem));
  stem->cached_tokens = stem->next_row;

  const int64_t whole = stem->num_tokens() / block_tokens();
  if (stem->joinable && whole * block_tokens() > matched) {
    const int64_t entered =
        cache_.Publish(stem->ns, absl::MakeConstSpan(stem->tokens).first(whole * block_tokens()),
                       stem->lease, stem->own.TakeFront(whole - matched / block_tokens()),
                       PublishAs(request, match.committed_tokens, now));
    stem->written_tokens = entered * block_tokens();
  }
  return stem;
}

bool KvStore::Refresh(Stem& stem) {
  if (stem.complete()) return false;
  if (stem.ready_tokens < stem.lease.num_tokens()) {
    stem.ready_tokens = std::max(stem.ready_tokens, cache_.CommittedTokens(stem.lease));
    stem.next_row = std::max(stem.next_row, std::min(stem.ready_tokens, LastNeededRow(stem)));
  }
  if (stem.next_row >= stem.lease.num_tokens() || stem.next_row < stem.ready_tokens) return true;
  if (cache_.Produces(stem.lease)) return true;
  return !cache_.HasProducer(stem.lease) && cache_.TakeOver(stem.lease);
}

void KvStore::Advance(Stem& stem, int64_t rows) {
  stem.next_row += rows;
  stem.computed_tokens += rows;
  if (stem.next_row <= stem.ready_tokens) return;
  stem.ready_tokens = stem.next_row;
  cache_.Commit(stem.lease, stem.ready_tokens);
}

int64_t KvStore::PublishLate(Stem& stem, const GenerateRequest& request, absl::Duration now) {
  if (request.cache_skip_write || stem.joinable || !stem.complete() ||
      stem.ns != NamespaceOf(request.tenant_salt)) {
    return 0;
  }
  const int64_t blocks =
      stem.num_tokens() / block_tokens() - stem.lease.num_tokens() / block_tokens();
  const int64_t tokens = stem.num_tokens() / block_tokens() * block_tokens();
  const int64_t entered =
      cache_.Publish(stem.ns, absl::MakeConstSpan(stem.tokens).first(tokens), stem.lease,
                     stem.own.TakeFront(blocks), PublishAs(request, tokens, now));
  stem.lease.Release();
  return entered * block_tokens();
}

absl::Status KvStore::CopyBlock(const std::vector<BlockId>& src, const std::vector<BlockId>& dst) {
  if (src.empty()) return absl::OkStatus();
  std::vector<int32_t> raw_src, raw_dst;
  for (BlockId id : src) raw_src.push_back(Raw(id));
  for (BlockId id : dst) raw_dst.push_back(Raw(id));
  return decoder_.ops().CopyBlocks({.pool = pool_.all(),
                                    .src = raw_src.data(),
                                    .dst = raw_dst.data(),
                                    .n = static_cast<int64_t>(raw_src.size())});
}

absl::Status KvStore::Fork(const std::shared_ptr<Stem>& stem, const std::vector<Sprout>& sprouts) {
  const int64_t whole =
      stem->num_tokens() / block_tokens() - stem->lease.num_tokens() / block_tokens();
  BlockSet shared = stem->own.TakeFront(whole);
  BlockSet tail = std::exchange(stem->own, std::move(shared));
  std::vector<BlockId> src, dst;
  for (size_t i = 0; i < sprouts.size(); ++i) {
    Sample& sample = sprouts[i].group->samples[sprouts[i].sample];
    if (tail.size() > 0 && i + 1 < sprouts.size()) {
      absl::StatusOr<BlockSet> copy = cache_.Allocate(1);
      if (!copy.ok()) {
        sample.state = Sample::State::kIdle;
        continue;
      }
      src.push_back(tail.ids()[0]);
      dst.push_back(copy->ids()[0]);
      sample.own = std::move(copy).value();
    }
    sample.state = Sample::State::kDecoding;
    sample.stem = stem;
    sample.kv_tokens = stem->num_tokens();
  }
  RETURN_IF_ERROR(CopyBlock(src, dst));
  if (!sprouts.empty() && tail.size() > 0) {
    sprouts.back().group->samples[sprouts.back().sample].own = std::move(tail);
  }
  return absl::OkStatus();
}

bool KvStore::NeedsBlock(const Sample& sample) const {
  const int64_t blocks = sample.stem->num_tokens() / block_tokens() + sample.own.size();
  return sample.kv_tokens >= blocks * block_tokens();
}

bool KvStore::Grow(Sample& sample) {
  if (!NeedsBlock(sample)) return true;
  absl::StatusOr<BlockSet> block = cache_.Allocate(1);
  if (!block.ok()) return false;
  sample.own.Append(std::move(block).value());
  return true;
}

int64_t KvStore::Release(Group& group, int32_t sample_index, absl::Duration now) {
  Sample& sample = group.samples[sample_index];
  if (sample.stem == nullptr) return 0;
  const std::shared_ptr<Stem> stem = std::move(sample.stem);
  BlockSet own = std::exchange(sample.own, BlockSet());
  const int64_t kv_tokens = std::exchange(sample.kv_tokens, 0);
  if (!stem->joinable) {
    return stem.use_count() == 1 ? PublishLate(*stem, group.request, now) : 0;
  }
  const int64_t whole = kv_tokens / block_tokens();
  const int64_t blocks = whole - stem->num_tokens() / block_tokens();
  if (blocks <= 0 || stem->ns != NamespaceOf(group.request.tenant_salt)) return 0;
  std::vector<int32_t> path = group.Path(sample_index);
  path.resize(whole * block_tokens());
  Lease lease = cache_.Share(stem->lease);
  return block_tokens() * cache_.Publish(stem->ns, path, lease, own.TakeFront(blocks),
                                         PublishAs(group.request, whole * block_tokens(), now));
}

int64_t KvStore::BlocksFor(int64_t num_tokens, int64_t leased_tokens, int64_t samples) const {
  return (num_tokens + block_tokens() - 1) / block_tokens() - leased_tokens / block_tokens() +
         samples;
}

}  // namespace coppice
