// The tokenizer that both file formats build: added tokens, normaliser, pre-tokenizer, BPE, special
// tokens around.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "kernels/model/added_tokens.h"
#include "kernels/model/bpe.h"
#include "kernels/model/pre_tokenizer.h"
#include "kernels/model/tokenizer.h"
#include "kernels/model/utf8.h"

namespace coppice {

constexpr int64_t kMaxTokenId = int64_t{1} << 24;

// A vocabulary as files state it: token text in the byte-level alphabet, id, and merges in order of
// rank.
struct BpeFile {
  std::vector<std::pair<std::string, int32_t>> tokens;
  std::vector<std::pair<std::string, std::string>> merges;
  std::vector<AddedToken> added;
  std::optional<UnicodeForm> normalizer;
  PreTokenizer pre_tokenizer;
  std::string unknown_token;  // empty = none
  bool fuse_unknown = false;
  bool ignore_merges = false;
  std::vector<int32_t> special_prefix, special_suffix;  // around every text when add_special
  int32_t bos = -1, eos = -1;
};

// INVALID_ARGUMENT for ids out of range or listed twice, and for merges outside the vocabulary.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(BpeFile file);

// The stages of a named model family (GGUF's tokenizer.ggml.pre): gpt-2, smollm, llama-bpe, qwen2.
// UNIMPLEMENTED lists them.
absl::StatusOr<PreTokenizer> NamedPreTokenizer(absl::string_view name);

}  // namespace coppice
