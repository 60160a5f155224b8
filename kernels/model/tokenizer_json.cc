// Tokenizer::FromJson: the parts of Hugging Face's tokenizer.json that byte-level BPE models use.
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/bpe_tokenizer.h"
#include "kernels/model/json_fields.h"

namespace coppice {
namespace {

using nlohmann::json;

absl::Status Unsupported(absl::string_view part, absl::string_view got, absl::string_view want) {
  return absl::UnimplementedError(
      absl::StrCat("tokenizer.json ", part, " ", got, ": want one of ", want));
}

absl::StatusOr<std::string> TypeOf(const json& part) {
  std::string type;
  RETURN_IF_ERROR(ReadString(part, "type", type));
  return type;
}

absl::StatusOr<int32_t> ParseId(const json& id) {
  if (id.is_number_integer() && id >= 0 && id < kMaxTokenId) return id.get<int32_t>();
  return absl::InvalidArgumentError("tokenizer.json: want token ids in 0..2^24-1");
}

absl::Status ParseMerges(const json& merges, BpeFile& file) {
  for (const json& merge : merges) {
    const bool is_pair =
        merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string();
    if (is_pair) {
      file.merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
      continue;
    }
    const std::string text = merge.is_string() ? merge.get<std::string>() : "";
    const size_t space = text.find(' ');
    if (space == std::string::npos) {
      return absl::InvalidArgumentError(
          "tokenizer.json merges: want \"left right\" or [\"left\", \"right\"]");
    }
    file.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
  }
  return absl::OkStatus();
}

// Options of BPE that change the result and that byte-level models do not use.
absl::Status RejectUnusedOptions(const json& model) {
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    std::string text;
    RETURN_IF_ERROR(ReadString(model, key, text));
    if (!text.empty()) return Unsupported(key, text, "null");
  }
  bool byte_fallback = false;
  RETURN_IF_ERROR(ReadBool(model, "byte_fallback", byte_fallback));
  if (byte_fallback) return Unsupported("byte_fallback", "true", "false");
  double dropout = 0;
  RETURN_IF_ERROR(ReadDouble(model, "dropout", dropout));
  if (dropout != 0) return Unsupported("dropout", absl::StrCat(dropout), "null");
  return absl::OkStatus();
}

absl::Status ParseModel(const json& root, BpeFile& file) {
  const json* model = FindField(root, "model");
  if (model == nullptr) return absl::InvalidArgumentError("tokenizer.json: no field model");
  ASSIGN_OR_RETURN(const std::string type, TypeOf(*model));
  if (type != "BPE") return Unsupported("model", type, "BPE");
  RETURN_IF_ERROR(RejectUnusedOptions(*model));
  RETURN_IF_ERROR(ReadString(*model, "unk_token", file.unknown_token));
  RETURN_IF_ERROR(ReadBool(*model, "fuse_unk", file.fuse_unknown));
  RETURN_IF_ERROR(ReadBool(*model, "ignore_merges", file.ignore_merges));
  const json* vocab = FindField(*model, "vocab");
  const json* merges = FindField(*model, "merges");
  if (vocab == nullptr || !vocab->is_object() || merges == nullptr || !merges->is_array()) {
    return absl::InvalidArgumentError(
        "tokenizer.json model: want an object vocab and an array merges");
  }
  for (const auto& [token, id] : vocab->items()) {
    ASSIGN_OR_RETURN(const int32_t token_id, ParseId(id));
    file.tokens.emplace_back(token, token_id);
  }
  return ParseMerges(*merges, file);
}

absl::Status ParseAddedTokens(const json& root, BpeFile& file) {
  const json* list = FindField(root, "added_tokens");
  if (list == nullptr) return absl::OkStatus();
  if (!list->is_array()) return absl::InvalidArgumentError("added_tokens: want an array");
  for (const json& entry : *list) {
    AddedToken token;
    const json* id = FindField(entry, "id");
    if (id == nullptr) return absl::InvalidArgumentError("added_tokens: an entry has no id");
    ASSIGN_OR_RETURN(token.id, ParseId(*id));
    RETURN_IF_ERROR(ReadString(entry, "content", token.content));
    RETURN_IF_ERROR(ReadBool(entry, "special", token.special));
    token.normalized = !token.special;
    RETURN_IF_ERROR(ReadBool(entry, "normalized", token.normalized));
    RETURN_IF_ERROR(ReadBool(entry, "single_word", token.single_word));
    RETURN_IF_ERROR(ReadBool(entry, "lstrip", token.lstrip));
    RETURN_IF_ERROR(ReadBool(entry, "rstrip", token.rstrip));
    file.added.push_back(std::move(token));
  }
  return absl::OkStatus();
}

// The children of a Sequence under `key`, or the part itself.
absl::StatusOr<std::vector<const json*>> Flatten(const json* part, const char* key) {
  std::vector<const json*> out;
  if (part == nullptr) return out;
  ASSIGN_OR_RETURN(const std::string type, TypeOf(*part));
  if (type != "Sequence") {
    out.push_back(part);
    return out;
  }
  const json* children = FindField(*part, key);
  if (children == nullptr || !children->is_array()) {
    return absl::InvalidArgumentError(absl::StrCat("tokenizer.json ", key, ": want an array"));
  }
  for (const json& child : *children) out.push_back(&child);
  return out;
}

absl::Status ParseNormalizer(const json& root, BpeFile& file) {
  ASSIGN_OR_RETURN(const auto parts, Flatten(FindField(root, "normalizer"), "normalizers"));
  for (const json* part : parts) {
    ASSIGN_OR_RETURN(const std::string type, TypeOf(*part));
    if ((type != "NFC" && type != "NFD") || file.normalizer.has_value()) {
      return Unsupported("normalizer", type, "NFC, NFD, once");
    }
    file.normalizer = type == "NFC" ? UnicodeForm::kNfc : UnicodeForm::kNfd;
  }
  return absl::OkStatus();
}

// Text that a pattern matches literally.
std::string Quote(absl::string_view text) {
  std::string out;
  for (const char c : text) {
    if (absl::ascii_ispunct(static_cast<unsigned char>(c))) out.push_back('\\');
    out.push_back(c);
  }
  return out;
}

absl::Status AddSplit(PreTokenizer& pre, absl::string_view pattern,
                      Splitter::Behavior behavior = Splitter::Behavior::kIsolated,
                      bool invert = false) {
  ASSIGN_OR_RETURN(Splitter splitter, Splitter::Create(pattern, behavior, invert));
  pre.AddSplit(std::move(splitter));
  return absl::OkStatus();
}

absl::Status ParseSplit(const json& part, PreTokenizer& pre) {
  std::string behavior, pattern;
  bool invert = false;
  RETURN_IF_ERROR(ReadString(part, "behavior", behavior));
  RETURN_IF_ERROR(ReadBool(part, "invert", invert));
  if (behavior != "Isolated" && behavior != "Removed") {
    return Unsupported("split behavior", behavior, "Isolated, Removed");
  }
  const json* source = FindField(part, "pattern");
  if (source == nullptr) return absl::InvalidArgumentError("tokenizer.json split: no pattern");
  RETURN_IF_ERROR(ReadString(*source, "String", pattern));
  pattern = Quote(pattern);
  RETURN_IF_ERROR(ReadString(*source, "Regex", pattern));
  if (pattern.empty()) return absl::InvalidArgumentError("tokenizer.json split: empty pattern");
  return AddSplit(
      pre, pattern,
      behavior == "Removed" ? Splitter::Behavior::kRemoved : Splitter::Behavior::kIsolated, invert);
}

absl::Status ParseByteLevel(const json& part, PreTokenizer& pre) {
  bool add_prefix_space = true, use_regex = true;  // tokenizers' defaults
  RETURN_IF_ERROR(ReadBool(part, "add_prefix_space", add_prefix_space));
  RETURN_IF_ERROR(ReadBool(part, "use_regex", use_regex));
  if (add_prefix_space) pre.AddPrefixSpace();
  return use_regex ? AddSplit(pre, kGpt2Pattern) : absl::OkStatus();
}

absl::Status ParsePreTokenizer(const json& root, BpeFile& file) {
  ASSIGN_OR_RETURN(const auto parts, Flatten(FindField(root, "pre_tokenizer"), "pretokenizers"));
  bool byte_level = false;
  for (const json* part : parts) {
    ASSIGN_OR_RETURN(const std::string type, TypeOf(*part));
    if (byte_level) return Unsupported("pre_tokenizer behind ByteLevel", type, "none");
    if (type == "ByteLevel") {
      RETURN_IF_ERROR(ParseByteLevel(*part, file.pre_tokenizer));
      byte_level = true;
    } else if (type == "Split") {
      RETURN_IF_ERROR(ParseSplit(*part, file.pre_tokenizer));
    } else if (type == "Digits") {
      bool individual = false;
      RETURN_IF_ERROR(ReadBool(*part, "individual_digits", individual));
      RETURN_IF_ERROR(AddSplit(file.pre_tokenizer, individual ? kOneDigitPattern : kDigitsPattern));
    } else {
      return Unsupported("pre_tokenizer", type, "ByteLevel, Split, Digits, Sequence");
    }
  }
  if (!byte_level) return Unsupported("pre_tokenizer", "without ByteLevel", "byte-level BPE");
  return absl::OkStatus();
}

// {"SpecialToken": {"id": text}} or {"Sequence": {"id": "A"}}; the ids of the texts are in
// `special_tokens`.
absl::Status ParseTemplate(const json& part, BpeFile& file) {
  const json* single = FindField(part, "single");
  const json* specials = FindField(part, "special_tokens");
  if (single == nullptr || !single->is_array()) {
    return absl::InvalidArgumentError("tokenizer.json TemplateProcessing: want an array single");
  }
  std::vector<int32_t>* side = &file.special_prefix;
  for (const json& piece : *single) {
    const json* token = FindField(piece, "SpecialToken");
    if (token == nullptr) {
      side = &file.special_suffix;
      continue;
    }
    std::string name;
    RETURN_IF_ERROR(ReadString(*token, "id", name));
    const json* entry = specials == nullptr ? nullptr : FindField(*specials, name.c_str());
    const json* ids = entry == nullptr ? nullptr : FindField(*entry, "ids");
    if (ids == nullptr || !ids->is_array()) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokenizer.json TemplateProcessing: no ids of ", name));
    }
    for (const json& id : *ids) {
      ASSIGN_OR_RETURN(const int32_t token_id, ParseId(id));
      side->push_back(token_id);
    }
  }
  return absl::OkStatus();
}

absl::Status ParsePostProcessor(const json& root, BpeFile& file) {
  ASSIGN_OR_RETURN(const auto parts, Flatten(FindField(root, "post_processor"), "processors"));
  for (const json* part : parts) {
    ASSIGN_OR_RETURN(const std::string type, TypeOf(*part));
    if (type == "TemplateProcessing") {
      RETURN_IF_ERROR(ParseTemplate(*part, file));
    } else if (type != "ByteLevel") {  // ByteLevel only moves offsets, which we do not report
      return Unsupported("post_processor", type, "TemplateProcessing, ByteLevel, Sequence");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(absl::string_view text) {
  ASSIGN_OR_RETURN(const json root, ParseJsonObject(text, "tokenizer.json"));
  BpeFile file;
  RETURN_IF_ERROR(ParseModel(root, file));
  RETURN_IF_ERROR(ParseAddedTokens(root, file));
  RETURN_IF_ERROR(ParseNormalizer(root, file));
  RETURN_IF_ERROR(ParsePreTokenizer(root, file));
  RETURN_IF_ERROR(ParsePostProcessor(root, file));
  return MakeBpeTokenizer(std::move(file));
}

}  // namespace coppice
