#define PCRE2_CODE_UNIT_WIDTH 8
#include "kernels/model/pre_tokenizer.h"

#include <pcre2.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace coppice {

const char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const char kLlama3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const char kQwen2Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const char kOneDigitPattern[] = R"(\p{N})";
const char kDigitsPattern[] = R"(\p{N}+)";

namespace {

// Unicode's White_Space. PCRE2's own \s also holds U+180E, which left that property in Unicode 6.3.
constexpr absl::string_view kSpaces =
    R"(\x{09}-\x{0d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// Writes \s (and \S outside classes) as explicit ranges.
std::string ExpandSpaces(absl::string_view pattern) {
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c != '\\' || i + 1 == pattern.size()) {
      if (c == '[') in_class = true;
      if (c == ']') in_class = false;
      out.push_back(c);
      continue;
    }
    const char escaped = pattern[++i];
    if (escaped == 's') {
      absl::StrAppend(&out, in_class ? "" : "[", kSpaces, in_class ? "" : "]");
    } else if (escaped == 'S' && !in_class) {
      absl::StrAppend(&out, "[^", kSpaces, "]");
    } else {
      out.push_back(c);
      out.push_back(escaped);
    }
  }
  return out;
}

struct FreeMatch {
  void operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }
};

// The next match at or behind `from`: negative when there is none. The JIT's stack may be too
// small; the interpreter's is not.
int Match(const pcre2_code* code, absl::string_view text, size_t from, pcre2_match_data* match) {
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const int rc = pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, match, nullptr);
  if (rc != PCRE2_ERROR_JIT_STACKLIMIT) return rc;
  return pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, match,
                     nullptr);
}

}  // namespace

void Splitter::FreeCode::operator()(pcre2_real_code_8* code) const { pcre2_code_free(code); }

absl::StatusOr<Splitter> Splitter::Create(absl::string_view pattern, Behavior behavior,
                                          bool invert) {
  const std::string expanded = ExpandSpaces(pattern);
  int error = 0;
  size_t offset = 0;
  Splitter splitter;
  splitter.behavior_ = behavior;
  splitter.invert_ = invert;
  splitter.code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(expanded.data()), expanded.size(),
                                     PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error,
                                     &offset, nullptr));
  if (splitter.code_ == nullptr) {
    char text[256] = "";
    pcre2_get_error_message(error, reinterpret_cast<PCRE2_UCHAR*>(text), sizeof(text));
    return absl::InvalidArgumentError(
        absl::StrCat("pre-tokenizer pattern ", pattern, ": ", text, " at ", offset));
  }
  pcre2_jit_compile(splitter.code_.get(), PCRE2_JIT_COMPLETE);  // without it the interpreter runs
  return splitter;
}

void Splitter::Split(absl::string_view text, const Sink& sink) const {
  const std::unique_ptr<pcre2_match_data, FreeMatch> match(
      pcre2_match_data_create_from_pattern(code_.get(), nullptr));
  const auto emit = [&](size_t begin, size_t end, bool is_match) {
    const bool keep = is_match == invert_ || behavior_ == Behavior::kIsolated;
    if (begin < end && keep) sink(text.substr(begin, end - begin));
  };
  size_t done = 0, from = 0;
  while (from <= text.size() && Match(code_.get(), text, from, match.get()) > 0) {
    const size_t* range = pcre2_get_ovector_pointer(match.get());
    const size_t begin = range[0], end = range[1];
    if (end <= begin) {  // an empty match cuts nothing; step over one character
      from = begin + 1;
      while (from < text.size() && (text[from] & 0xC0) == 0x80) ++from;
      continue;
    }
    emit(done, begin, false);
    emit(begin, end, true);
    done = from = end;
  }
  emit(done, text.size(), false);
}

void PreTokenizer::RunFrom(size_t stage, absl::string_view text, const Splitter::Sink& sink) const {
  if (stage == stages_.size()) {
    sink(text);
    return;
  }
  const auto next = [&](absl::string_view piece) { RunFrom(stage + 1, piece, sink); };
  if (stages_[stage].splitter.has_value()) {
    stages_[stage].splitter->Split(text, next);
  } else if (!text.empty() && text[0] == ' ') {
    next(text);
  } else {
    next(absl::StrCat(" ", text));
  }
}

}  // namespace coppice
