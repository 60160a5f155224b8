#include "kernels/model/json_fields.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace coppice {
namespace {

absl::Status WrongType(const char* key, const char* want, const nlohmann::json& got) {
  return absl::InvalidArgumentError(
      absl::StrCat("json field ", key, ": want ", want, ", got ", got.type_name()));
}

}  // namespace

absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view text, absl::string_view what) {
  auto value = nlohmann::json::parse(text.begin(), text.end(), /*cb=*/nullptr,
                                     /*allow_exceptions=*/false);
  if (value.is_discarded()) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, " is not valid JSON: ", text.size(), " bytes; fetch the file again"));
  }
  if (!value.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": want a JSON object, got ", value.type_name()));
  }
  return value;
}

const nlohmann::json* FindField(const nlohmann::json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

absl::Status ReadInt(const nlohmann::json& object, const char* key, int64_t& out) {
  const nlohmann::json* field = FindField(object, key);
  if (field == nullptr) return absl::OkStatus();
  if (!field->is_number_integer()) return WrongType(key, "an integer", *field);
  if (field->is_number_unsigned() && field->get<uint64_t>() > uint64_t{INT64_MAX}) {
    return absl::InvalidArgumentError(absl::StrCat("json field ", key, ": want at most ", INT64_MAX,
                                                   ", got ", field->get<uint64_t>()));
  }
  out = field->get<int64_t>();
  return absl::OkStatus();
}

absl::Status ReadDouble(const nlohmann::json& object, const char* key, double& out) {
  const nlohmann::json* field = FindField(object, key);
  if (field == nullptr) return absl::OkStatus();
  if (!field->is_number()) return WrongType(key, "a number", *field);
  out = field->get<double>();
  return absl::OkStatus();
}

absl::Status ReadBool(const nlohmann::json& object, const char* key, bool& out) {
  const nlohmann::json* field = FindField(object, key);
  if (field == nullptr) return absl::OkStatus();
  if (!field->is_boolean()) return WrongType(key, "true or false", *field);
  out = field->get<bool>();
  return absl::OkStatus();
}

absl::Status ReadString(const nlohmann::json& object, const char* key, std::string& out) {
  const nlohmann::json* field = FindField(object, key);
  if (field == nullptr) return absl::OkStatus();
  if (!field->is_string()) return WrongType(key, "a string", *field);
  out = field->get_ref<const std::string&>();
  return absl::OkStatus();
}

}  // namespace coppice
