// Typed reads of JSON fields without exceptions, for files that we did not write. A missing or null
// field keeps the default that `out` holds; a field of another type or out of range is
// INVALID_ARGUMENT naming it. Any thread.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace coppice {

// Parses `text`, which `what` names in errors. INVALID_ARGUMENT unless it is one JSON object.
absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view text, absl::string_view what);

// The field, or nullptr if `object` is no object, has no such field, or the field is null.
const nlohmann::json* FindField(const nlohmann::json& object, const char* key);

absl::Status ReadInt(const nlohmann::json& object, const char* key, int64_t& out);
absl::Status ReadDouble(const nlohmann::json& object, const char* key, double& out);
absl::Status ReadBool(const nlohmann::json& object, const char* key, bool& out);
absl::Status ReadString(const nlohmann::json& object, const char* key, std::string& out);

}  // namespace coppice
