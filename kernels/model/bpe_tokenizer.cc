#include "kernels/model/bpe_tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/byte_level.h"

namespace coppice {
namespace {

struct TokenText {
  std::string bytes;
  bool special = false;
};

class BpeTokenizer final : public Tokenizer {
 public:
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Create(BpeFile file) {
    std::unique_ptr<BpeTokenizer> tokenizer(new BpeTokenizer);
    RETURN_IF_ERROR(tokenizer->AddModel(file));
    tokenizer->normalizer_ = file.normalizer;
    for (const AddedToken& token : file.added) RETURN_IF_ERROR(tokenizer->AddAdded(token));
    tokenizer->pre_tokenizer_ = std::move(file.pre_tokenizer);
    tokenizer->prefix_ = std::move(file.special_prefix);
    tokenizer->suffix_ = std::move(file.special_suffix);
    tokenizer->bos_ = file.bos;
    tokenizer->eos_ = file.eos;
    return tokenizer;
  }

  std::vector<int32_t> Encode(absl::string_view text, bool add_special) const override {
    const std::string valid = ReplaceInvalidUtf8(text);
    std::vector<int32_t> ids;
    if (add_special) ids = prefix_;
    Bpe::Scratch scratch;
    const auto add_token = [&](int32_t id) { ids.push_back(id); };
    const auto encode_piece = [&](absl::string_view piece) { bpe_->Encode(piece, scratch, ids); };
    const auto encode_normalized = [&](absl::string_view piece) {
      pre_tokenizer_.Run(piece, encode_piece);
    };
    const auto encode_raw = [&](absl::string_view piece) {
      if (!normalizer_.has_value()) {
        normalized_added_.Split(piece, encode_normalized, add_token);
      } else {
        normalized_added_.Split(NormalizeUnicode(piece, *normalizer_), encode_normalized,
                                add_token);
      }
    };
    raw_added_.Split(valid, encode_raw, add_token);
    if (add_special) ids.insert(ids.end(), suffix_.begin(), suffix_.end());
    return ids;
  }

  std::string DecodeBytes(const std::vector<int32_t>& ids, bool skip_special) const override {
    std::string out;
    for (const int32_t id : ids) {
      const auto it = texts_.find(id);
      if (it != texts_.end() && !(skip_special && it->second.special)) out += it->second.bytes;
    }
    return out;
  }

  int32_t vocab_size() const override { return vocab_size_; }
  bool IsSpecial(int32_t id) const override {
    const auto it = texts_.find(id);
    return it != texts_.end() && it->second.special;
  }
  int32_t bos_token() const override { return bos_; }
  int32_t eos_token() const override { return eos_; }

 private:
  BpeTokenizer() = default;

  absl::Status AddModel(BpeFile& file) {
    Bpe::Vocabulary vocabulary;
    vocabulary.reserve(file.tokens.size());
    texts_.reserve(file.tokens.size() + file.added.size());
    Bpe::Options options{.ignore_merges = file.ignore_merges, .fuse_unknown = file.fuse_unknown};
    for (auto& [text, id] : file.tokens) {
      if (!texts_.try_emplace(id).second) return BadId(id, "is listed twice");
      RETURN_IF_ERROR(CheckId(id));
      if (!file.unknown_token.empty() && text == file.unknown_token) options.unknown_token = id;
      std::optional<std::string> bytes = ByteLevelToBytes(text);
      // A text outside the alphabet is never the result of a merge; it is only decoded.
      if (bytes.has_value()) vocabulary[*bytes] = id;
      texts_[id].bytes = bytes.has_value() ? *std::move(bytes) : std::move(text);
    }
    ASSIGN_OR_RETURN(const auto merges, DecodeMerges(file.merges));
    ASSIGN_OR_RETURN(Bpe bpe, Bpe::Create(std::move(vocabulary), merges, options));
    bpe_.emplace(std::move(bpe));
    return absl::OkStatus();
  }

  static absl::StatusOr<std::vector<std::pair<std::string, std::string>>> DecodeMerges(
      const std::vector<std::pair<std::string, std::string>>& merges) {
    std::vector<std::pair<std::string, std::string>> decoded;
    decoded.reserve(merges.size());
    for (const auto& [left, right] : merges) {
      auto left_bytes = ByteLevelToBytes(left);
      auto right_bytes = ByteLevelToBytes(right);
      if (!left_bytes.has_value() || !right_bytes.has_value()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "tokenizer merge ", decoded.size(), ": want characters of the byte-level alphabet"));
      }
      decoded.emplace_back(*std::move(left_bytes), *std::move(right_bytes));
    }
    return decoded;
  }

  absl::Status AddAdded(const AddedToken& token) {
    RETURN_IF_ERROR(CheckId(token.id));
    std::string content = ReplaceInvalidUtf8(token.content);
    if (token.normalized && normalizer_.has_value()) {
      content = NormalizeUnicode(content, *normalizer_);
    }
    (token.normalized ? normalized_added_ : raw_added_).Add(token, content);
    TokenText& text = texts_[token.id];
    text.bytes = content;
    text.special = token.special;
    return absl::OkStatus();
  }

  static absl::Status BadId(int64_t id, absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("tokenizer: token id ", id, " ", what));
  }

  absl::Status CheckId(int32_t id) {
    if (id < 0 || id >= kMaxTokenId) return BadId(id, "is out of range: want 0..2^24-1");
    vocab_size_ = std::max(vocab_size_, id + 1);
    return absl::OkStatus();
  }

  absl::flat_hash_map<int32_t, TokenText> texts_;
  AddedTokenSplitter raw_added_, normalized_added_;
  std::optional<UnicodeForm> normalizer_;
  PreTokenizer pre_tokenizer_;
  std::optional<Bpe> bpe_;
  std::vector<int32_t> prefix_, suffix_;
  int32_t vocab_size_ = 0;
  int32_t bos_ = -1, eos_ = -1;
};

absl::Status AddIsolated(PreTokenizer& pre, absl::string_view pattern) {
  ASSIGN_OR_RETURN(Splitter splitter,
                   Splitter::Create(pattern, Splitter::Behavior::kIsolated, false));
  pre.AddSplit(std::move(splitter));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeBpeTokenizer(BpeFile file) {
  return BpeTokenizer::Create(std::move(file));
}

absl::StatusOr<PreTokenizer> NamedPreTokenizer(absl::string_view name) {
  PreTokenizer pre;
  if (name == "gpt-2") {
    RETURN_IF_ERROR(AddIsolated(pre, kGpt2Pattern));
  } else if (name == "smollm") {
    RETURN_IF_ERROR(AddIsolated(pre, kOneDigitPattern));
    RETURN_IF_ERROR(AddIsolated(pre, kGpt2Pattern));
  } else if (name == "llama-bpe") {
    RETURN_IF_ERROR(AddIsolated(pre, kLlama3Pattern));
  } else if (name == "qwen2") {
    RETURN_IF_ERROR(AddIsolated(pre, kQwen2Pattern));
  } else {
    return absl::UnimplementedError(
        absl::StrCat("pre-tokenizer \"", name, "\": want one of gpt-2, smollm, llama-bpe, qwen2"));
  }
  return pre;
}

std::string Tokenizer::Decode(const std::vector<int32_t>& ids, bool skip_special) const {
  return ReplaceInvalidUtf8(DecodeBytes(ids, skip_special));
}

std::string StreamDecoder::Push(int32_t id) {
  pending_ += tokenizer_->DecodeBytes({id}, /*skip_special=*/true);
  // Only the last character can be unfinished; it has at most three bytes so far.
  size_t certain = pending_.size();
  for (size_t i = pending_.size() - std::min<size_t>(3, pending_.size()); i < pending_.size();
       ++i) {
    if (DecodeUtf8(absl::string_view(pending_).substr(i)).truncated) {
      certain = i;
      break;
    }
  }
  std::string text = ReplaceInvalidUtf8(absl::string_view(pending_).substr(0, certain));
  pending_.erase(0, certain);
  return text;
}

std::string StreamDecoder::Finish() {
  std::string text = ReplaceInvalidUtf8(pending_);
  pending_.clear();
  return text;
}

}  // namespace coppice
