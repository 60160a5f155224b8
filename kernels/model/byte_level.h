// The byte-level alphabet of GPT-2 (Radford et al. 2019): each byte is written as one printable
// character in vocabularies and merges; bytes that are printable in Latin-1 stand for themselves,
// the others for U+0100 onwards in ascending order.
#pragma once

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace coppice {

// Bytes that `token` stands for; nullopt if one of its characters is outside the alphabet.
std::optional<std::string> ByteLevelToBytes(absl::string_view token);

}  // namespace coppice
