#define PCRE2_CODE_UNIT_WIDTH 8
#include "kernels/model/pre_tokenizer.h"

#include <pcre2.h>

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace coppice {

const char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
const char kLlama3Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
const char kQwen2Pattern[] =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// Rust's char::is_numeric, which Digits asks, already knows the numbers of Unicode 17.
const char kOneDigitPattern[] = R"([\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}])";
const char kDigitsPattern[] = R"([\p{N}\x{11DE0}-\x{11DE9}\x{16FF4}-\x{16FF6}]+)";

namespace {

// Unicode's White_Space. PCRE2's own \s also holds U+180E, which left that property in Unicode 6.3.
constexpr absl::string_view kSpaces =
    R"(\x{09}-\x{0d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// PCRE2 10.42 knows Unicode 14, tokenizers' patterns mean Unicode 16: what was added in between.
constexpr absl::string_view kLetters =
    R"(\p{L})"
    R"(\x{1C89}-\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105F3})"
    R"(\x{10D4A}-\x{10D65}\x{10D6F}-\x{10D85}\x{10EC2}-\x{10EC4}\x{1123F}-\x{11240})"
    R"(\x{11380}-\x{11389}\x{1138B}\x{1138E}\x{11390}-\x{113B5}\x{113B7}\x{113D1})"
    R"(\x{113D3}\x{11BC0}-\x{11BE0}\x{11F02}\x{11F04}-\x{11F10}\x{11F12}-\x{11F33})"
    R"(\x{1342F}\x{13441}-\x{13446}\x{13460}-\x{143FA}\x{16100}-\x{1611D})"
    R"(\x{16D40}-\x{16D6C}\x{18CFF}\x{1B132}\x{1B155}\x{1DF25}-\x{1DF2A})"
    R"(\x{1E030}-\x{1E06D}\x{1E4D0}-\x{1E4EB}\x{1E5D0}-\x{1E5ED}\x{1E5F0}\x{2B739})"
    R"(\x{2EBF0}-\x{2EE5D}\x{31350}-\x{323AF})";
constexpr absl::string_view kNumbers =
    R"(\p{N})"
    R"(\x{10D40}-\x{10D49}\x{116D0}-\x{116E3}\x{11BF0}-\x{11BF9}\x{11F50}-\x{11F59})"
    R"(\x{16130}-\x{16139}\x{16D70}-\x{16D79}\x{1CCF0}-\x{1CCF9}\x{1D2C0}-\x{1D2D3})"
    R"(\x{1E4F0}-\x{1E4F9}\x{1E5F1}-\x{1E5FA})";

// The ranges that an escape at the start of `pattern` stands for, or empty if it is none of ours.
absl::string_view RangesOf(absl::string_view pattern, size_t& escape_size) {
  static constexpr std::pair<absl::string_view, absl::string_view> kEscapes[] = {
      {"\\s", kSpaces}, {"\\p{L}", kLetters}, {"\\p{N}", kNumbers}};
  for (const auto& [escape, ranges] : kEscapes) {
    if (!absl::StartsWith(pattern, escape)) continue;
    escape_size = escape.size();
    return ranges;
  }
  return {};
}

// Writes \s, \p{L} and \p{N} (and \S outside classes) as explicit ranges.
std::string ExpandClasses(absl::string_view pattern) {
  std::string out;
  bool in_class = false;
  while (!pattern.empty()) {
    size_t size = 1;
    const absl::string_view ranges = RangesOf(pattern, size);
    if (!ranges.empty()) {
      absl::StrAppend(&out, in_class ? "" : "[", ranges, in_class ? "" : "]");
    } else if (absl::StartsWith(pattern, "\\S") && !in_class) {
      size = 2;
      absl::StrAppend(&out, "[^", kSpaces, "]");
    } else {
      size = pattern[0] == '\\' ? 2 : 1;
      if (pattern[0] == '[') in_class = true;
      if (pattern[0] == ']') in_class = false;
      absl::StrAppend(&out, pattern.substr(0, size));
    }
    pattern.remove_prefix(std::min(size, pattern.size()));
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
  const std::string expanded = ExpandClasses(pattern);
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
