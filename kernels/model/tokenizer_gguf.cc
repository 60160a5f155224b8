// Tokenizer::FromGguf: vocabulary, merges and token types as llama.cpp's converter stores them.
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/bpe_tokenizer.h"
#include "kernels/model/gguf.h"

namespace coppice {
namespace {

// tokenizer.ggml.token_type
constexpr int64_t kControl = 3;
constexpr int64_t kUserDefined = 4;

absl::Status ReadTokens(const GgufFile& gguf, BpeFile& file) {
  std::vector<absl::string_view> tokens;
  std::vector<int64_t> types;
  RETURN_IF_ERROR(gguf.Read("tokenizer.ggml.tokens", tokens));
  RETURN_IF_ERROR(gguf.Read("tokenizer.ggml.token_type", types));
  if (tokens.empty() || tokens.size() != types.size() ||
      tokens.size() > static_cast<size_t>(kMaxTokenId)) {
    return absl::InvalidArgumentError(
        absl::StrCat("gguf tokenizer: want 1..2^24 tokens and a type for each, got ", tokens.size(),
                     " tokens and ", types.size(), " types"));
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    const int32_t id = static_cast<int32_t>(i);
    file.tokens.emplace_back(std::string(tokens[i]), id);
    if (types[i] != kControl && types[i] != kUserDefined) continue;
    const bool special = types[i] == kControl;
    file.added.push_back(
        {.id = id, .content = std::string(tokens[i]), .normalized = !special, .special = special});
  }
  return absl::OkStatus();
}

absl::Status ReadMerges(const GgufFile& gguf, BpeFile& file) {
  std::vector<absl::string_view> merges;
  RETURN_IF_ERROR(gguf.Read("tokenizer.ggml.merges", merges));
  for (const absl::string_view merge : merges) {
    const size_t space = merge.find(' ');
    if (space == absl::string_view::npos) {
      return absl::InvalidArgumentError("gguf tokenizer: want merges of the form \"left right\"");
    }
    file.merges.emplace_back(std::string(merge.substr(0, space)),
                             std::string(merge.substr(space + 1)));
  }
  return absl::OkStatus();
}

// The id under `key`, or -1 if it is absent or outside the vocabulary.
absl::StatusOr<int32_t> ReadId(const GgufFile& gguf, absl::string_view key, const BpeFile& file) {
  int64_t id = -1;
  RETURN_IF_ERROR(gguf.Read(key, id));
  const bool known = id >= 0 && id < static_cast<int64_t>(file.tokens.size());
  return known ? static_cast<int32_t>(id) : -1;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromGguf(const GgufFile& gguf) {
  std::string model, pre;
  RETURN_IF_ERROR(gguf.Read("tokenizer.ggml.model", model));
  RETURN_IF_ERROR(gguf.Read("tokenizer.ggml.pre", pre));
  if (model != "gpt2") {
    return absl::UnimplementedError(
        absl::StrCat("tokenizer.ggml.model \"", model, "\": want gpt2 (byte-level BPE)"));
  }
  BpeFile file;
  ASSIGN_OR_RETURN(file.pre_tokenizer, NamedPreTokenizer(pre));
  if (pre == "qwen2") file.normalizer = UnicodeForm::kNfc;
  file.ignore_merges = pre == "llama-bpe";
  RETURN_IF_ERROR(ReadTokens(gguf, file));
  RETURN_IF_ERROR(ReadMerges(gguf, file));
  ASSIGN_OR_RETURN(file.bos, ReadId(gguf, "tokenizer.ggml.bos_token_id", file));
  ASSIGN_OR_RETURN(file.eos, ReadId(gguf, "tokenizer.ggml.eos_token_id", file));
  bool add_bos = pre == "llama-bpe", add_eos = false;
  RETURN_IF_ERROR(gguf.Read("tokenizer.ggml.add_bos_token", add_bos));
  RETURN_IF_ERROR(gguf.Read("tokenizer.ggml.add_eos_token", add_eos));
  if (add_bos && file.bos >= 0) file.special_prefix = {file.bos};
  if (add_eos && file.eos >= 0) file.special_suffix = {file.eos};
  return MakeBpeTokenizer(std::move(file));
}

}  // namespace coppice
