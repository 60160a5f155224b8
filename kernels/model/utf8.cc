#include "kernels/model/utf8.h"

#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "kernels/base/check.h"

namespace coppice {
namespace {

constexpr absl::string_view kReplacement = "\xEF\xBF\xBD";

bool IsAscii(absl::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return (c & 0x80) == 0; });
}

// Stable sort of every run of combining marks by combining class: the canonical order of
// Unicode 3.11. utf8proc's own ordering is quadratic in the length of a run, which a client
// chooses.
void OrderCombiningMarks(std::vector<utf8proc_int32_t>& text) {
  const auto combining_class = [](utf8proc_int32_t c) {
    return utf8proc_get_property(c)->combining_class;
  };
  const auto is_starter = [&](utf8proc_int32_t c) { return combining_class(c) == 0; };
  for (auto run = text.begin(); run != text.end();) {
    run = std::find_if_not(run, text.end(), is_starter);
    const auto end = std::find_if(run, text.end(), is_starter);
    std::stable_sort(run, end, [&](utf8proc_int32_t a, utf8proc_int32_t b) {
      return combining_class(a) < combining_class(b);
    });
    run = end;
  }
}

std::vector<utf8proc_int32_t> Decompose(absl::string_view text) {
  constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE);
  std::vector<utf8proc_int32_t> out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    text.remove_prefix(c.length);
    utf8proc_int32_t parts[8];  // the longest canonical decomposition has 4 characters
    const utf8proc_ssize_t n = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.code_point),
                                                       parts, 8, kOptions, nullptr);
    CHECK(n >= 0 && n <= 8) << n;
    out.insert(out.end(), parts, parts + n);
  }
  return out;
}

}  // namespace

Utf8Char DecodeUtf8(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {first, 1, true, false};
  Utf8Char out;
  out.length = 1;
  if (first < 0xC2 || first > 0xF4) return out;
  const int want = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  uint32_t code_point = first & (0x7Fu >> want);
  for (int i = 1; i < want; ++i) {
    if (static_cast<size_t>(i) == text.size()) {
      out.truncated = true;
      return out;
    }
    uint8_t low = 0x80, high = 0xBF;
    if (i == 1 && first == 0xE0) low = 0xA0;   // overlong
    if (i == 1 && first == 0xED) high = 0x9F;  // surrogates
    if (i == 1 && first == 0xF0) low = 0x90;   // overlong
    if (i == 1 && first == 0xF4) high = 0x8F;  // above U+10FFFF
    if (byte(i) < low || byte(i) > high) return out;
    code_point = (code_point << 6) | (byte(i) & 0x3Fu);
    out.length = i + 1;
  }
  return {code_point, want, true, false};
}

void AppendUtf8(uint32_t c, std::string& out) {
  if (c < 0x80) {
    out.push_back(static_cast<char>(c));
    return;
  }
  const auto tail = [&](int shift) {
    out.push_back(static_cast<char>(0x80 | ((c >> shift) & 0x3F)));
  };
  if (c < 0x800) {
    out.push_back(static_cast<char>(0xC0 | (c >> 6)));
  } else if (c < 0x10000) {
    out.push_back(static_cast<char>(0xE0 | (c >> 12)));
    tail(6);
  } else {
    out.push_back(static_cast<char>(0xF0 | (c >> 18)));
    tail(12);
    tail(6);
  }
  tail(0);
}

std::string ReplaceInvalidUtf8(absl::string_view text) {
  if (IsAscii(text)) return std::string(text);
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const Utf8Char c = DecodeUtf8(text);
    const absl::string_view piece = c.valid ? text.substr(0, c.length) : kReplacement;
    out.append(piece.data(), piece.size());
    text.remove_prefix(c.length);
  }
  return out;
}

bool IsWhiteSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool IsWordChar(uint32_t c) {
  if (c == 0x200C || c == 0x200D) return true;  // join controls
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return false;
  }
}

std::string NormalizeUnicode(absl::string_view text, UnicodeForm form) {
  if (IsAscii(text)) return std::string(text);
  std::vector<utf8proc_int32_t> points = Decompose(text);
  OrderCombiningMarks(points);
  if (form == UnicodeForm::kNfc) {
    const utf8proc_ssize_t n = utf8proc_normalize_utf32(
        points.data(), static_cast<utf8proc_ssize_t>(points.size()),
        static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    CHECK(n >= 0) << utf8proc_errmsg(n);
    points.resize(n);
  }
  std::string out;
  out.reserve(text.size());
  for (const utf8proc_int32_t c : points) AppendUtf8(static_cast<uint32_t>(c), out);
  return out;
}

}  // namespace coppice
