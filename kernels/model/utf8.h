// UTF-8 and Unicode for the tokenizer. Any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace coppice {

// The first character of a text. An invalid sequence has `length` of its maximal subpart (Unicode
// 15, section 3.9, table 3-7): the bytes that one U+FFFD replaces, as Python and Rust do.
// `truncated`: the text ends inside a character that may yet become valid.
struct Utf8Char {
  uint32_t code_point = 0xFFFD;
  int length = 0;
  bool valid = false;
  bool truncated = false;
};

// REQUIRES: !text.empty().
Utf8Char DecodeUtf8(absl::string_view text);
// REQUIRES: code_point is a Unicode scalar value.
void AppendUtf8(uint32_t code_point, std::string& out);

// `text` with every maximal invalid subpart replaced by U+FFFD. O(n).
std::string ReplaceInvalidUtf8(absl::string_view text);

bool IsWhiteSpace(uint32_t code_point);  // Unicode property White_Space
bool IsWordChar(
    uint32_t code_point);  // \w of Unicode TR18: letters, marks, decimal digits, connectors

enum class UnicodeForm { kNfc, kNfd };

// O(n log n), also for long runs of combining marks. REQUIRES: valid UTF-8.
std::string NormalizeUnicode(absl::string_view text, UnicodeForm form);

}  // namespace coppice
