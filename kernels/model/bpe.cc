#include "kernels/model/bpe.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

// std heaps keep the largest on top: the best candidate must compare greatest.
bool IsWorse(const Bpe::Scratch::Candidate& a, const Bpe::Scratch::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

}  // namespace

absl::StatusOr<Bpe> Bpe::Create(Vocabulary vocabulary,
                                const std::vector<std::pair<std::string, std::string>>& merges,
                                const Options& options) {
  Bpe bpe;
  bpe.options_ = options;
  bpe.vocabulary_ = std::move(vocabulary);
  for (int b = 0; b < 256; ++b) {
    const auto it = bpe.vocabulary_.find(std::string(1, static_cast<char>(b)));
    bpe.byte_tokens_[b] = it == bpe.vocabulary_.end() ? -1 : it->second;
  }
  bpe.merges_.reserve(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    RETURN_IF_ERROR(bpe.AddMerge(static_cast<int32_t>(rank), merges[rank]));
  }
  return bpe;
}

absl::Status Bpe::AddMerge(int32_t rank, const std::pair<std::string, std::string>& merge) {
  const auto left = vocabulary_.find(merge.first);
  const auto right = vocabulary_.find(merge.second);
  const auto merged = vocabulary_.find(merge.first + merge.second);
  if (left == vocabulary_.end() || right == vocabulary_.end() || merged == vocabulary_.end()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "tokenizer merge ", rank, ": want two tokens whose join is a token; check the vocabulary"));
  }
  merges_[PairKey(left->second, right->second)] = {rank, merged->second};
  return absl::OkStatus();
}

void Bpe::MakeSymbols(absl::string_view piece, Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  symbols.clear();
  bool last_unknown = false;
  for (const char c : piece) {
    int32_t id = byte_tokens_[static_cast<uint8_t>(c)];
    const bool unknown = id < 0;
    if (unknown && (options_.unknown_token < 0 || (options_.fuse_unknown && last_unknown)))
      continue;
    if (unknown) id = options_.unknown_token;
    last_unknown = unknown;
    const int32_t position = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, position - 1, position + 1, true});
  }
  if (!symbols.empty()) symbols.back().next = -1;
}

void Bpe::PushCandidate(int32_t position, Scratch& scratch) const {
  const Scratch::Symbol& left = scratch.symbols[position];
  if (left.next < 0) return;
  const auto merge = merges_.find(PairKey(left.id, scratch.symbols[left.next].id));
  if (merge == merges_.end()) return;
  scratch.heap.push_back({merge->second.rank, position, merge->second.id});
  std::push_heap(scratch.heap.begin(), scratch.heap.end(), IsWorse);
}

void Bpe::MergeAll(Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  heap.clear();
  for (size_t i = 0; i + 1 < symbols.size(); ++i) PushCandidate(static_cast<int32_t>(i), scratch);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), IsWorse);
    const Scratch::Candidate top = heap.back();
    heap.pop_back();
    Scratch::Symbol& left = symbols[top.position];
    if (!left.alive || left.next < 0) continue;
    Scratch::Symbol& right = symbols[left.next];
    const auto merge = merges_.find(PairKey(left.id, right.id));
    if (merge == merges_.end() || merge->second.id != top.id) continue;  // an older pair stood here
    left.id = top.id;
    left.next = right.next;
    right.alive = false;
    if (left.next >= 0) symbols[left.next].previous = top.position;
    if (left.previous >= 0) PushCandidate(left.previous, scratch);
    PushCandidate(top.position, scratch);
  }
}

void Bpe::Encode(absl::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const {
  if (options_.ignore_merges) {
    const auto it = vocabulary_.find(piece);
    if (it != vocabulary_.end()) {
      out.push_back(it->second);
      return;
    }
  }
  MakeSymbols(piece, scratch);
  MergeAll(scratch);
  for (const Scratch::Symbol& symbol : scratch.symbols) {
    if (symbol.alive) out.push_back(symbol.id);
  }
}

}  // namespace coppice
