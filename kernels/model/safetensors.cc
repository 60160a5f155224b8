#include "kernels/model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/json_fields.h"
#include "kernels/model/mapped_file.h"
#include "kernels/model/stored_tensor.h"

namespace coppice {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int64_t kMaxIndexBytes = int64_t{64} << 20;

absl::Status Corrupt(const std::string& path, absl::string_view what) {
  return absl::DataLossError(
      absl::StrCat("safetensors ", path, ": ", what, "; fetch the file again"));
}

absl::StatusOr<StoredType> ParseDtype(const std::string& name) {
  if (name == "F32") return StoredType::kF32;
  if (name == "F16") return StoredType::kF16;
  if (name == "BF16") return StoredType::kBF16;
  return absl::UnimplementedError(
      absl::StrCat("safetensors dtype ", name, ": want one of F32, F16, BF16"));
}

// An array of non-negative integers, e.g. a shape or [begin, end).
absl::StatusOr<std::vector<int64_t>> ParseSizes(const nlohmann::json& entry, const char* key) {
  const nlohmann::json* field = FindField(entry, key);
  std::vector<int64_t> sizes;
  bool ok = field != nullptr && field->is_array();
  if (ok) {
    for (const nlohmann::json& n : *field) {
      ok = ok && n.is_number_unsigned() && n.get<uint64_t>() <= uint64_t{INT64_MAX};
      sizes.push_back(ok ? n.get<int64_t>() : 0);
    }
  }
  if (ok) return sizes;
  return absl::DataLossError(absl::StrCat(key, ": want an array of sizes below 2^63"));
}

struct ByteRange {
  int64_t begin, end;
};

absl::StatusOr<std::pair<StoredTensor, ByteRange>> ParseEntry(const nlohmann::json& entry,
                                                              absl::string_view data) {
  std::string dtype;
  RETURN_IF_ERROR(ReadString(entry, "dtype", dtype));
  StoredTensor tensor;
  ASSIGN_OR_RETURN(tensor.type, ParseDtype(dtype));
  ASSIGN_OR_RETURN(tensor.shape, ParseSizes(entry, "shape"));
  ASSIGN_OR_RETURN(const std::vector<int64_t> range, ParseSizes(entry, "data_offsets"));
  const int64_t size = static_cast<int64_t>(data.size());
  if (range.size() != 2 || range[0] > range[1] || range[1] > size) {
    return absl::DataLossError(absl::StrCat("data_offsets: want a range inside the ", size,
                                            " data bytes of the file, got one outside"));
  }
  const std::optional<int64_t> want = StoredBytes(tensor.type, tensor.shape);
  if (!want.has_value() || *want != range[1] - range[0]) {
    return absl::DataLossError(absl::StrCat("data_offsets: want ", want.value_or(-1),
                                            " bytes for its shape, got ", range[1] - range[0]));
  }
  tensor.data = data.substr(range[0], *want);
  return std::make_pair(std::move(tensor), ByteRange{range[0], range[1]});
}

// The JSON header as an object without repeated names.
absl::StatusOr<nlohmann::json> ParseHeader(absl::string_view text) {
  std::set<std::string> seen;
  std::string repeated;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    if (event == nlohmann::json::parse_event_t::key && depth == 1) {
      const auto& name = value.get_ref<const std::string&>();
      if (!seen.insert(name).second) repeated = name;
    }
    return true;
  };
  auto header = nlohmann::json::parse(text.begin(), text.end(), watch, /*allow_exceptions=*/false);
  if (header.is_discarded() || !header.is_object()) {
    return absl::DataLossError("header: want a JSON object");
  }
  if (!repeated.empty()) {
    return absl::DataLossError(absl::StrCat("header: tensor ", repeated, " is listed twice"));
  }
  return header;
}

class SafetensorsFile final : public TensorSource {
 public:
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path) {
    ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
    std::unique_ptr<SafetensorsFile> source(new SafetensorsFile(std::move(file)));
    RETURN_IF_ERROR(source->Parse());
    return source;
  }

  std::vector<std::string> Names() const override { return names_; }

  absl::StatusOr<std::vector<int64_t>> Shape(absl::string_view name) const override {
    ASSIGN_OR_RETURN(const StoredTensor* tensor, Find(name));
    return tensor->shape;
  }

  absl::StatusOr<StoredType> Type(absl::string_view name) const override {
    ASSIGN_OR_RETURN(const StoredTensor* tensor, Find(name));
    return tensor->type;
  }

  absl::Status ReadRows(absl::string_view name, int64_t row_begin, int64_t row_end,
                        float* out) const override {
    ASSIGN_OR_RETURN(const StoredTensor* tensor, Find(name));
    return tensor->ReadRows(row_begin, row_end, out);
  }

 private:
  explicit SafetensorsFile(MappedFile file) : file_(std::move(file)) {}

  absl::StatusOr<const StoredTensor*> Find(absl::string_view name) const {
    const auto it = tensors_.find(name);
    if (it != tensors_.end()) return &it->second;
    return absl::NotFoundError(absl::StrCat("safetensors ", file_.path(), " has no tensor ", name));
  }

  absl::Status Parse() {
    const absl::string_view bytes = file_.bytes();
    uint64_t header_bytes = 0;
    if (bytes.size() >= sizeof(header_bytes)) {
      std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
    }
    const uint64_t rest = bytes.size() < 8 ? 0 : bytes.size() - 8;
    if (header_bytes == 0 || header_bytes > rest || header_bytes > kMaxHeaderBytes) {
      return Corrupt(file_.path(), absl::StrCat("header: want 1..", std::min(rest, kMaxHeaderBytes),
                                                " bytes, got ", header_bytes));
    }
    const auto header = ParseHeader(bytes.substr(8, header_bytes));
    if (!header.ok()) return Corrupt(file_.path(), header.status().message());
    return ParseTensors(*header, bytes.substr(8 + header_bytes));
  }

  absl::Status ParseTensors(const nlohmann::json& header, absl::string_view data) {
    std::vector<std::pair<ByteRange, std::string>> ranges;
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") continue;
      auto parsed = ParseEntry(entry, data);
      if (!parsed.ok()) {
        const std::string what = absl::StrCat("tensor ", name, ": ", parsed.status().message());
        if (absl::IsUnimplemented(parsed.status())) return absl::UnimplementedError(what);
        return Corrupt(file_.path(), what);
      }
      ranges.emplace_back(parsed->second, name);
      tensors_.emplace(name, std::move(parsed->first));
    }
    std::sort(ranges.begin(), ranges.end(),
              [](const auto& a, const auto& b) { return a.first.begin < b.first.begin; });
    for (size_t i = 0; i < ranges.size(); ++i) {
      if (i > 0 && ranges[i].first.begin < ranges[i - 1].first.end) {
        return Corrupt(file_.path(), absl::StrCat("tensors ", ranges[i - 1].second, " and ",
                                                  ranges[i].second, " overlap"));
      }
      names_.push_back(ranges[i].second);
    }
    return absl::OkStatus();
  }

  MappedFile file_;
  std::vector<std::string> names_;
  absl::flat_hash_map<std::string, StoredTensor> tensors_;
};

// Several files that together hold one model.
class ShardedSafetensors final : public TensorSource {
 public:
  // `weight_map`: tensor name -> file name inside `directory`.
  static absl::StatusOr<std::unique_ptr<TensorSource>> Open(const std::string& directory,
                                                            const nlohmann::json& weight_map) {
    auto source = std::make_unique<ShardedSafetensors>();
    absl::flat_hash_map<std::string, const TensorSource*> opened;
    for (const auto& [name, file] : weight_map.items()) {
      if (!file.is_string() || absl::StrContains(file.get_ref<const std::string&>(), "/")) {
        return absl::DataLossError(absl::StrCat("weight_map: want a plain file name for ", name));
      }
      const auto& file_name = file.get_ref<const std::string&>();
      const TensorSource*& shard = opened[file_name];
      if (shard == nullptr) {
        ASSIGN_OR_RETURN(auto opened_shard,
                         OpenSafetensors(absl::StrCat(directory, "/", file_name)));
        shard = opened_shard.get();
        source->shards_.push_back(std::move(opened_shard));
      }
      source->by_name_.emplace(name, shard);
    }
    RETURN_IF_ERROR(source->CheckIndex());
    return source;
  }

  std::vector<std::string> Names() const override {
    std::vector<std::string> names;
    for (const auto& shard : shards_) {
      for (std::string& name : shard->Names()) names.push_back(std::move(name));
    }
    return names;
  }

  absl::StatusOr<std::vector<int64_t>> Shape(absl::string_view name) const override {
    ASSIGN_OR_RETURN(const TensorSource* shard, Find(name));
    return shard->Shape(name);
  }

  absl::StatusOr<StoredType> Type(absl::string_view name) const override {
    ASSIGN_OR_RETURN(const TensorSource* shard, Find(name));
    return shard->Type(name);
  }

  absl::Status ReadRows(absl::string_view name, int64_t row_begin, int64_t row_end,
                        float* out) const override {
    ASSIGN_OR_RETURN(const TensorSource* shard, Find(name));
    return shard->ReadRows(name, row_begin, row_end, out);
  }

 private:
  absl::StatusOr<const TensorSource*> Find(absl::string_view name) const {
    const auto it = by_name_.find(name);
    if (it != by_name_.end()) return it->second;
    return absl::NotFoundError(absl::StrCat("safetensors index has no tensor ", name));
  }

  // The index and the shards must list the same tensors, each once.
  absl::Status CheckIndex() const {
    size_t stored = 0;
    for (const auto& shard : shards_) stored += shard->Names().size();
    if (stored != by_name_.size()) {
      return absl::DataLossError(absl::StrCat("safetensors shards: want the ", by_name_.size(),
                                              " tensors of the index, got ", stored,
                                              "; fetch the directory again"));
    }
    for (const auto& [name, shard] : by_name_) {
      const auto shape = shard->Shape(name);
      if (!shape.ok()) return absl::DataLossError(shape.status().message());
    }
    return absl::OkStatus();
  }

  std::vector<std::unique_ptr<TensorSource>> shards_;
  absl::flat_hash_map<std::string, const TensorSource*> by_name_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TensorSource>> OpenSafetensors(const std::string& path) {
  return SafetensorsFile::Open(path);
}

absl::StatusOr<std::unique_ptr<TensorSource>> OpenSafetensorsDirectory(const std::string& path) {
  const std::string index_path = path + "/model.safetensors.index.json";
  std::error_code ignored;
  if (!std::filesystem::exists(index_path, ignored)) {
    return OpenSafetensors(path + "/model.safetensors");
  }
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(index_path, kMaxIndexBytes));
  ASSIGN_OR_RETURN(const nlohmann::json index, ParseJsonObject(text, index_path));
  const nlohmann::json* weight_map = FindField(index, "weight_map");
  if (weight_map == nullptr || !weight_map->is_object()) {
    return absl::DataLossError(absl::StrCat(index_path, ": want an object weight_map"));
  }
  return ShardedSafetensors::Open(path, *weight_map);
}

}  // namespace coppice
