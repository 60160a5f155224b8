#include "server/rpc/field_check.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/ascii.h"

namespace coppice {

absl::Status InvalidField(absl::string_view field, absl::string_view want,
                          const absl::AlphaNum& got) {
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": want ", want, ", got ", got, "; correct the request"));
}

absl::Status NoTokenizer(absl::string_view what) {
  return absl::FailedPreconditionError(
      absl::StrCat(what, ": want a model with a tokenizer, got one without; use token ids"));
}

absl::Status At(absl::string_view path, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(path, status.message()));
}

absl::Status CheckName(absl::string_view field, absl::string_view name) {
  if (name.size() > kMaxNameBytes) {
    return InvalidField(field, absl::StrCat("at most ", kMaxNameBytes, " bytes"), name.size());
  }
  for (const char c : name) {
    if (!absl::ascii_isgraph(static_cast<unsigned char>(c))) {
      return InvalidField(field, "printable ASCII without spaces",
                          absl::StrCat("byte 0x", absl::Hex(static_cast<unsigned char>(c))));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckPlainName(absl::string_view field, absl::string_view name) {
  const bool plain = std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
  });
  if (plain && !name.empty() && name.size() <= 128 && name[0] != '.') return absl::OkStatus();
  return InvalidField(field, "1-128 of [A-Za-z0-9._-] not starting with a dot",
                      absl::StrCat(name.size(), " bytes"));
}

absl::Status CheckRange(absl::string_view field, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("an integer in [", min, ", ", max, "]"), value);
}

absl::Status CheckTokenIds(absl::string_view field, absl::Span<const int32_t> ids, int64_t vocab) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < vocab) continue;
    return InvalidField(absl::StrCat(field, "[", i, "]"),
                        absl::StrCat("a token id in [0, ", vocab, ")"), ids[i]);
  }
  return absl::OkStatus();
}

absl::Status CheckFinite(absl::string_view field, absl::Span<const float> values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i])) continue;
    return InvalidField(absl::StrCat(field, "[", i, "]"), "a finite number", values[i]);
  }
  return absl::OkStatus();
}

absl::Status CheckAtLeast(absl::string_view field, absl::Span<const float> values, float min) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (std::isfinite(values[i]) && values[i] >= min) continue;
    return InvalidField(absl::StrCat(field, "[", i, "]"), absl::StrCat("a finite number >= ", min),
                        values[i]);
  }
  return absl::OkStatus();
}

}  // namespace coppice
