// Reader of GGUF, versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):
// metadata and tensor table as they stand in the file; gguf_model.h gives them Hugging Face's names
// and shapes. Every count, length and offset is checked against the file before use, so allocations
// stay proportional to its size. DATA_LOSS for a broken file, UNIMPLEMENTED for a tensor type or
// version that we do not read.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/model/mapped_file.h"
#include "kernels/model/stored_tensor.h"

namespace coppice {

// Integers of all widths are int64 and floats double; text points into the file.
using GgufValue = std::variant<bool, int64_t, double, absl::string_view, std::vector<int64_t>,
                               std::vector<double>, std::vector<absl::string_view>>;

class GgufFile {
 public:
  static absl::StatusOr<std::unique_ptr<GgufFile>> Open(const std::string& path);

  const std::string& path() const { return file_.path(); }
  // By their GGUF names, e.g. "blk.0.attn_q.weight", in file order.
  const std::vector<std::string>& tensor_names() const { return tensor_names_; }
  const StoredTensor* FindTensor(absl::string_view name) const;  // null = absent

  // Metadata. An absent key leaves `out`; another type is INVALID_ARGUMENT.
  absl::Status Read(absl::string_view key, int64_t& out) const;
  absl::Status Read(absl::string_view key, double& out) const;
  absl::Status Read(absl::string_view key, bool& out) const;
  absl::Status Read(absl::string_view key, std::string& out) const;
  absl::Status Read(absl::string_view key, std::vector<int64_t>& out) const;
  absl::Status Read(absl::string_view key, std::vector<absl::string_view>& out) const;

 private:
  class Parser;

  explicit GgufFile(MappedFile file) : file_(std::move(file)) {}
  template <typename T>
  absl::StatusOr<const T*> Find(absl::string_view key, const char* want) const;

  MappedFile file_;
  absl::flat_hash_map<std::string, GgufValue> metadata_;
  absl::flat_hash_map<std::string, StoredTensor> tensors_;
  std::vector<std::string> tensor_names_;
};

}  // namespace coppice
