// MappedFile: a whole file as read-only memory. Move-only; unmaps in its destructor. The bytes are
// readable from any thread. Another process that truncates the file while it is mapped makes reads
// fault: model files are immutable while we run.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace coppice {

class MappedFile {
 public:
  // NOT_FOUND; INVALID_ARGUMENT for a directory.
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile();

  absl::string_view bytes() const { return bytes_; }
  const std::string& path() const { return path_; }

 private:
  MappedFile(std::string path, absl::string_view bytes);

  std::string path_;
  absl::string_view bytes_;
};

// The whole file as a string. NOT_FOUND, or RESOURCE_EXHAUSTED above `max_bytes`.
absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes);

}  // namespace coppice
