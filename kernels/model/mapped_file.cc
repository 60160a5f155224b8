#include "kernels/model/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

absl::Status FileError(absl::string_view action, const std::string& path, int error) {
  const std::string text = absl::StrCat(action, " ", path, ": ", strerror(error),
                                        "; check the path and its permissions");
  return error == ENOENT ? absl::NotFoundError(text) : absl::UnknownError(text);
}

}  // namespace

MappedFile::MappedFile(std::string path, absl::string_view bytes)
    : path_(std::move(path)), bytes_(bytes) {}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), bytes_(std::exchange(other.bytes_, absl::string_view())) {}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<char*>(bytes_.data()), bytes_.size());
}

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return FileError("open", path, errno);
  struct stat info;
  const bool is_file = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
  if (!is_file || info.st_size == 0) {
    close(fd);
    if (is_file) return MappedFile(path, absl::string_view());
    return absl::InvalidArgumentError(absl::StrCat("open ", path, ": want a regular file"));
  }
  const size_t size = static_cast<size_t>(info.st_size);
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  close(fd);
  if (data == MAP_FAILED) return FileError("map", path, error);
  // Readahead runs beside the parsing and dequantising of what has arrived.
  madvise(data, size, MADV_WILLNEED);
  return MappedFile(path, absl::string_view(static_cast<const char*>(data), size));
}

absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes) {
  ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  if (static_cast<int64_t>(file.bytes().size()) > max_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("read ", path, ": want at most ", max_bytes,
                                                     " bytes, got ", file.bytes().size()));
  }
  return std::string(file.bytes());
}

}  // namespace coppice
