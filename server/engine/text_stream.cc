#include "server/engine/text_stream.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"

namespace coppice {
namespace {

// Length of the longest end of `text` that begins `stop` (a proper part of it).
size_t BegunLength(absl::string_view text, absl::string_view stop) {
  for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; --n) {
    if (absl::StartsWith(stop, text.substr(text.size() - n))) return n;
  }
  return 0;
}

}  // namespace

TextStream::TextStream(const Tokenizer* tokenizer, std::vector<std::string> stop_strings)
    : decoder_(tokenizer), stop_strings_(std::move(stop_strings)) {}

std::string TextStream::Push(int32_t token) { return Release(decoder_.Push(token), false); }

std::string TextStream::Finish() {
  if (stopped_) return "";
  return Release(decoder_.Finish(), true);
}

std::string TextStream::Release(const std::string& piece, bool last) {
  held_ += piece;
  size_t cut = std::string::npos;
  size_t begun = 0;
  for (const std::string& stop : stop_strings_) {
    cut = std::min(cut, held_.find(stop));
    begun = std::max(begun, BegunLength(held_, stop));
  }
  if (cut != std::string::npos) {
    stopped_ = true;
    held_.resize(cut);
    return std::exchange(held_, "");
  }
  if (last) return std::exchange(held_, "");
  std::string certain = held_.substr(0, held_.size() - begun);
  held_.erase(0, certain.size());
  return certain;
}

}  // namespace coppice
