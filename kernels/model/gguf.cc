#include "kernels/model/gguf.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr int64_t kMinMetadataBytes = 8 + 4 + 1;
constexpr int64_t kMinTensorBytes = 8 + 4 + 4 + 8;

enum ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};

absl::StatusOr<StoredType> FromGgmlType(uint32_t type) {
  switch (type) {
    case 0:
      return StoredType::kF32;
    case 1:
      return StoredType::kF16;
    case 2:
      return StoredType::kQ4_0;
    case 3:
      return StoredType::kQ4_1;
    case 8:
      return StoredType::kQ8_0;
    case 30:
      return StoredType::kBF16;
    default:
      return absl::UnimplementedError(absl::StrCat(
          "ggml type ", type,
          ": want one of F32=0, F16=1, Q4_0=2, Q4_1=3, Q8_0=8, BF16=30; quantise the model anew"));
  }
}

}  // namespace

// Walks the file once, front to back. After a failed read every further read fails too, so callers
// check at the end of a group.
class GgufFile::Parser {
 public:
  explicit Parser(GgufFile& out) : out_(out), bytes_(out.file_.bytes()) {}

  absl::Status Run() {
    RETURN_IF_ERROR(ReadHeader());
    for (uint64_t i = 0; i < num_metadata_; ++i) RETURN_IF_ERROR(ReadMetadata());
    RETURN_IF_ERROR(out_.Read("general.alignment", alignment_));
    if (alignment_ < 1 || alignment_ > 1 << 20) {
      return Corrupt(absl::StrCat("general.alignment: want 1..2^20, got ", alignment_));
    }
    for (uint64_t i = 0; i < num_tensors_; ++i) RETURN_IF_ERROR(ReadTensor());
    return PlaceTensors();
  }

 private:
  struct Pending {
    std::string name;
    StoredTensor tensor;
    int64_t begin, size;
  };

  absl::Status Corrupt(absl::string_view what) const {
    return absl::DataLossError(
        absl::StrCat("gguf ", out_.path(), ": ", what, "; fetch the file again"));
  }
  absl::Status Truncated(absl::string_view where) const {
    return Corrupt(absl::StrCat(where, ": file ends at byte ", bytes_.size()));
  }
  uint64_t remaining() const { return bytes_.size() - position_; }

  template <typename T>
  T Take() {
    T value{};
    if (remaining() < sizeof(T)) {
      failed_ = true;
    } else {
      std::memcpy(&value, bytes_.data() + position_, sizeof(T));
      position_ += sizeof(T);
    }
    return value;
  }

  absl::string_view TakeString() {
    const uint64_t size = Take<uint64_t>();
    if (failed_ || size > remaining()) {
      failed_ = true;
      return {};
    }
    const absl::string_view text = bytes_.substr(position_, size);
    position_ += size;
    return text;
  }

  absl::Status ReadHeader() {
    const uint32_t magic = Take<uint32_t>();
    const uint32_t version = Take<uint32_t>();
    num_tensors_ = Take<uint64_t>();
    num_metadata_ = Take<uint64_t>();
    if (failed_) return Truncated("header");
    if (magic != kMagic) {
      return absl::DataLossError(
          absl::StrCat("gguf ", out_.path(),
                       ": header: want magic GGUF, got another format; give a GGUF file, "
                       "or the directory of config.json and *.safetensors"));
    }
    if (version != 2 && version != 3) {
      return absl::UnimplementedError(absl::StrCat("gguf ", out_.path(), ": version ", version,
                                                   ": want 2 or 3, little endian"));
    }
    if (num_metadata_ > remaining() / kMinMetadataBytes ||
        num_tensors_ > remaining() / kMinTensorBytes) {
      return Corrupt(absl::StrCat("header: ", num_metadata_, " metadata entries and ", num_tensors_,
                                  " tensors do not fit into ", bytes_.size(), " bytes"));
    }
    return absl::OkStatus();
  }

  absl::Status ReadMetadata() {
    const absl::string_view key = TakeString();
    const uint32_t type = Take<uint32_t>();
    if (failed_) return Truncated("metadata");
    GgufValue value;
    RETURN_IF_ERROR(type == kArray ? ReadArray(key, value) : ReadScalar(key, type, value));
    if (failed_) return Truncated(absl::StrCat("metadata ", key));
    if (!out_.metadata_.emplace(key, std::move(value)).second) {
      return Corrupt(absl::StrCat("metadata ", key, " is listed twice"));
    }
    return absl::OkStatus();
  }

  absl::Status ReadScalar(absl::string_view key, uint32_t type, GgufValue& value) {
    if (type == kString) {
      value = TakeString();
    } else if (type == kBool) {
      value = Take<uint8_t>() != 0;
    } else if (IsInteger(type)) {
      value = TakeInteger(type);
    } else if (type == kFloat32 || type == kFloat64) {
      value = TakeFloat(type);
    } else {
      return Corrupt(absl::StrCat("metadata ", key, ": unknown value type ", type));
    }
    return absl::OkStatus();
  }

  static bool IsInteger(uint32_t type) {
    return type <= kInt32 || type == kUint64 || type == kInt64;
  }

  int64_t TakeInteger(uint32_t type) {
    switch (type) {
      case kUint8:
        return Take<uint8_t>();
      case kInt8:
        return Take<int8_t>();
      case kUint16:
        return Take<uint16_t>();
      case kInt16:
        return Take<int16_t>();
      case kUint32:
        return Take<uint32_t>();
      case kInt32:
        return Take<int32_t>();
      case kUint64:  // sizes above 2^63 saturate and fail their range checks
        return static_cast<int64_t>(std::min<uint64_t>(Take<uint64_t>(), INT64_MAX));
      default:
        return Take<int64_t>();
    }
  }

  double TakeFloat(uint32_t type) { return type == kFloat32 ? Take<float>() : Take<double>(); }

  absl::Status ReadArray(absl::string_view key, GgufValue& value) {
    const uint32_t type = Take<uint32_t>();
    const uint64_t n = Take<uint64_t>();
    const uint64_t min_bytes = type == kString ? 8 : 1;
    if (failed_ || n > remaining() / min_bytes) {
      return Truncated(absl::StrCat("metadata ", key, ": array of ", n));
    }
    if (type == kString) {
      auto& list = value.emplace<std::vector<absl::string_view>>();
      for (uint64_t i = 0; i < n && !failed_; ++i) list.push_back(TakeString());
    } else if (type == kBool || IsInteger(type)) {
      auto& list = value.emplace<std::vector<int64_t>>();
      for (uint64_t i = 0; i < n && !failed_; ++i) {
        list.push_back(type == kBool ? Take<uint8_t>() : TakeInteger(type));
      }
    } else if (type == kFloat32 || type == kFloat64) {
      auto& list = value.emplace<std::vector<double>>();
      for (uint64_t i = 0; i < n && !failed_; ++i) list.push_back(TakeFloat(type));
    } else {
      return Corrupt(absl::StrCat("metadata ", key, ": unknown array type ", type));
    }
    return absl::OkStatus();
  }

  absl::Status ReadTensor() {
    Pending pending;
    pending.name = std::string(TakeString());
    const uint32_t rank = Take<uint32_t>();
    if (failed_) return Truncated("tensor table");
    if (rank < 1 || rank > 4) {
      return Corrupt(absl::StrCat("tensor ", pending.name, ": want rank 1..4, got ", rank));
    }
    for (uint32_t i = 0; i < rank; ++i) {  // innermost first in the file
      const int64_t dim = TakeInteger(kUint64);
      pending.tensor.shape.insert(pending.tensor.shape.begin(), dim);
    }
    const uint32_t type = Take<uint32_t>();
    pending.begin = TakeInteger(kUint64);
    if (failed_) return Truncated("tensor table");
    const absl::StatusOr<StoredType> stored = FromGgmlType(type);
    if (!stored.ok()) {
      return absl::UnimplementedError(absl::StrCat("gguf ", out_.path(), ": tensor ", pending.name,
                                                   ": ", stored.status().message()));
    }
    pending.tensor.type = *stored;
    const std::optional<int64_t> size = StoredBytes(pending.tensor.type, pending.tensor.shape);
    if (!size.has_value()) {
      return Corrupt(
          absl::StrCat("tensor ", pending.name, ": its shape does not fit its type or overflows"));
    }
    pending.size = *size;
    pending_.push_back(std::move(pending));
    return absl::OkStatus();
  }

  // Tensor data begins at the next multiple of the alignment behind the table.
  absl::Status PlaceTensors() {
    const uint64_t align = static_cast<uint64_t>(alignment_);
    const uint64_t start = (position_ + align - 1) / align * align;
    const absl::string_view data = start > bytes_.size() ? "" : bytes_.substr(start);
    const int64_t data_bytes = static_cast<int64_t>(data.size());
    for (Pending& p : pending_) {
      if (p.begin > data_bytes || p.size > data_bytes - p.begin) {
        return Corrupt(absl::StrCat("tensor ", p.name, ": want ", p.size, " bytes at offset ",
                                    p.begin, ", file has ", data_bytes, " bytes of data"));
      }
      if (p.begin % alignment_ != 0) {
        return Corrupt(absl::StrCat("tensor ", p.name, ": want an offset that is a multiple of ",
                                    alignment_, ", got ", p.begin));
      }
      p.tensor.data = data.substr(p.begin, p.size);
      if (!out_.tensors_.emplace(p.name, p.tensor).second) {
        return Corrupt(absl::StrCat("tensor ", p.name, " is listed twice"));
      }
      out_.tensor_names_.push_back(p.name);
    }
    return CheckOverlap();
  }

  absl::Status CheckOverlap() {
    std::sort(pending_.begin(), pending_.end(),
              [](const Pending& a, const Pending& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < pending_.size(); ++i) {
      const Pending& a = pending_[i - 1];
      if (pending_[i].begin < a.begin + a.size) {
        return Corrupt(absl::StrCat("tensors ", a.name, " and ", pending_[i].name, " overlap"));
      }
    }
    return absl::OkStatus();
  }

  GgufFile& out_;
  absl::string_view bytes_;
  uint64_t position_ = 0;
  bool failed_ = false;
  uint64_t num_tensors_ = 0;
  uint64_t num_metadata_ = 0;
  int64_t alignment_ = 32;
  std::vector<Pending> pending_;
};

absl::StatusOr<std::unique_ptr<GgufFile>> GgufFile::Open(const std::string& path) {
  ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  std::unique_ptr<GgufFile> gguf(new GgufFile(std::move(file)));
  RETURN_IF_ERROR(Parser(*gguf).Run());
  return gguf;
}

const StoredTensor* GgufFile::FindTensor(absl::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

template <typename T>
absl::StatusOr<const T*> GgufFile::Find(absl::string_view key, const char* want) const {
  const auto it = metadata_.find(key);
  if (it == metadata_.end()) return nullptr;
  if (const T* value = std::get_if<T>(&it->second)) return value;
  return absl::InvalidArgumentError(
      absl::StrCat("gguf ", path(), ": metadata ", key, ": want ", want, ", got another type"));
}

absl::Status GgufFile::Read(absl::string_view key, int64_t& out) const {
  ASSIGN_OR_RETURN(const int64_t* value, Find<int64_t>(key, "an integer"));
  if (value != nullptr) out = *value;
  return absl::OkStatus();
}

absl::Status GgufFile::Read(absl::string_view key, double& out) const {
  ASSIGN_OR_RETURN(const double* value, Find<double>(key, "a float"));
  if (value != nullptr) out = *value;
  return absl::OkStatus();
}

absl::Status GgufFile::Read(absl::string_view key, bool& out) const {
  ASSIGN_OR_RETURN(const bool* value, Find<bool>(key, "a bool"));
  if (value != nullptr) out = *value;
  return absl::OkStatus();
}

absl::Status GgufFile::Read(absl::string_view key, std::string& out) const {
  ASSIGN_OR_RETURN(const absl::string_view* value, Find<absl::string_view>(key, "a string"));
  if (value != nullptr) out = std::string(*value);
  return absl::OkStatus();
}

absl::Status GgufFile::Read(absl::string_view key, std::vector<int64_t>& out) const {
  ASSIGN_OR_RETURN(const std::vector<int64_t>* value,
                   Find<std::vector<int64_t>>(key, "an array of integers"));
  if (value != nullptr) out = *value;
  return absl::OkStatus();
}

absl::Status GgufFile::Read(absl::string_view key, std::vector<absl::string_view>& out) const {
  ASSIGN_OR_RETURN(const std::vector<absl::string_view>* value,
                   Find<std::vector<absl::string_view>>(key, "an array of strings"));
  if (value != nullptr) out = *value;
  return absl::OkStatus();
}

}  // namespace coppice
