#include "kernels/model/added_tokens.h"

#include <algorithm>

#include "kernels/model/utf8.h"

namespace coppice {
namespace {

// Start of the last character of `text`. REQUIRES: valid, non-empty UTF-8.
size_t LastCharBegin(absl::string_view text) {
  size_t i = text.size() - 1;
  while (i > 0 && (text[i] & 0xC0) == 0x80) --i;
  return i;
}

// Where the white space at the end of `text` begins.
size_t TrailingSpaceBegin(absl::string_view text) {
  while (!text.empty()) {
    const size_t begin = LastCharBegin(text);
    if (!IsWhiteSpace(DecodeUtf8(text.substr(begin)).code_point)) break;
    text = text.substr(0, begin);
  }
  return text.size();
}

// How many bytes of white space `text` begins with.
size_t LeadingSpaceSize(absl::string_view text) {
  size_t size = 0;
  while (size < text.size()) {
    const Utf8Char c = DecodeUtf8(text.substr(size));
    if (!IsWhiteSpace(c.code_point)) break;
    size += c.length;
  }
  return size;
}

}  // namespace

void AddedTokenSplitter::Add(const AddedToken& token, absl::string_view content) {
  if (content.empty()) return;
  first_bytes_.set(static_cast<uint8_t>(content[0]));
  int32_t node = 0;
  for (const char c : content) {
    const uint64_t edge = static_cast<uint64_t>(node) * 256 + static_cast<uint8_t>(c);
    const auto [it, inserted] = edges_.try_emplace(edge, num_nodes_);
    if (inserted) ++num_nodes_;
    node = it->second;
  }
  // Of two tokens with one text the first wins.
  if (accepts_.try_emplace(node, static_cast<int32_t>(tokens_.size())).second) {
    tokens_.push_back(token);
  }
}

AddedTokenSplitter::Found AddedTokenSplitter::LongestAt(absl::string_view text) const {
  Found found;
  int32_t node = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto edge =
        edges_.find(static_cast<uint64_t>(node) * 256 + static_cast<uint8_t>(text[i]));
    if (edge == edges_.end()) break;
    node = edge->second;
    const auto accept = accepts_.find(node);
    if (accept != accepts_.end()) found = {accept->second, i + 1};
  }
  return found;
}

bool AddedTokenSplitter::StandsAlone(absl::string_view text, size_t begin, size_t end) {
  const bool word_before =
      begin > 0 &&
      IsWordChar(DecodeUtf8(text.substr(LastCharBegin(text.substr(0, begin)))).code_point);
  const bool word_behind = end < text.size() && IsWordChar(DecodeUtf8(text.substr(end)).code_point);
  return !word_before && !word_behind;
}

void AddedTokenSplitter::Split(absl::string_view text, const TextSink& on_text,
                               const TokenSink& on_token) const {
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    Found found;
    if (first_bytes_[static_cast<uint8_t>(text[at])]) found = LongestAt(text.substr(at));
    if (found.token < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[found.token];
    size_t begin = at, end = at + found.size;
    at = end;
    if (token.single_word && !StandsAlone(text, begin, end)) continue;
    if (token.lstrip) begin = std::max(TrailingSpaceBegin(text.substr(0, begin)), done);
    if (token.rstrip) end += LeadingSpaceSize(text.substr(end));
    if (done < begin) on_text(text.substr(done, begin - done));
    on_token(token.id);
    done = end;
  }
  if (done < text.size()) on_text(text.substr(done));
}

}  // namespace coppice
