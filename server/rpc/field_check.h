// Checks of single fields of a client's message. A failed check is INVALID_ARGUMENT with the
// message
// `<field>: want <want>, got <got>; correct the request`; outer levels put their path before it
// with At().
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace coppice {

// Of a name as the client gives it; the engine sees the tenant before it.
inline constexpr size_t kMaxNameBytes = 256;

absl::Status InvalidField(absl::string_view field, absl::string_view want,
                          const absl::AlphaNum& got);

// FAILED_PRECONDITION: the model has no tokenizer for `what`.
absl::Status NoTokenizer(absl::string_view what);

// The same error, its field now inside `path`. REQUIRES: !status.ok().
absl::Status At(absl::string_view path, const absl::Status& status);

// Request, session and step ids, checkpoint and tenant names end up in logs: printable ASCII
// without spaces.
absl::Status CheckName(absl::string_view field, absl::string_view name);
// Name of a file or tenant: 1-128 of [A-Za-z0-9._-], not starting with a dot.
absl::Status CheckPlainName(absl::string_view field, absl::string_view name);

absl::Status CheckRange(absl::string_view field, int64_t value, int64_t min, int64_t max);
absl::Status CheckTokenIds(absl::string_view field, absl::Span<const int32_t> ids, int64_t vocab);
// Every value finite and at least `min`.
absl::Status CheckFinite(absl::string_view field, absl::Span<const float> values);
absl::Status CheckAtLeast(absl::string_view field, absl::Span<const float> values, float min);

}  // namespace coppice
