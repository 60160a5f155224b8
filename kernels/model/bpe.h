// Byte-pair encoding (Sennrich, Haddow, Birch 2016) over bytes: the pair of lowest rank merges
// first, the leftmost of equals. Immutable after creation; any thread. Encode is O(n log n) in the
// bytes of a piece.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace coppice {

class Bpe {
 public:
  struct Options {
    bool ignore_merges = false;  // a piece that is itself a token is not split
    int32_t unknown_token =
        -1;  // for bytes outside the vocabulary; -1 = they vanish, as in Hugging Face tokenizers
    bool fuse_unknown = false;  // one unknown_token for a run of such bytes
  };
  using Vocabulary = absl::flat_hash_map<std::string, int32_t>;  // bytes -> id

  // `merges` in order of rank, as bytes. INVALID_ARGUMENT if a part or the result of a merge is no
  // token.
  static absl::StatusOr<Bpe> Create(Vocabulary vocabulary,
                                    const std::vector<std::pair<std::string, std::string>>& merges,
                                    const Options& options);

  // Memory of one Encode, reused between pieces.
  struct Scratch {
    struct Symbol {
      int32_t id;
      int32_t previous, next;  // -1 = none
      bool alive;
    };
    struct Candidate {
      int32_t rank, position, id;
    };
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };
  // Appends the tokens of one piece. REQUIRES: piece.size() < 2^31.
  void Encode(absl::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const;

 private:
  struct Merge {
    int32_t rank, id;
  };
  static uint64_t PairKey(int32_t left, int32_t right) {
    return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) |
           static_cast<uint32_t>(right);
  }

  absl::Status AddMerge(int32_t rank, const std::pair<std::string, std::string>& merge);
  void MakeSymbols(absl::string_view piece, Scratch& scratch) const;
  void PushCandidate(int32_t position, Scratch& scratch) const;
  void MergeAll(Scratch& scratch) const;

  Options options_;
  Vocabulary vocabulary_;
  int32_t byte_tokens_[256];                     // -1 = the byte is no token
  absl::flat_hash_map<uint64_t, Merge> merges_;  // PairKey(left, right) -> merged token
};

}  // namespace coppice
