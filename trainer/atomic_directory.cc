#include "trainer/atomic_directory.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

absl::Status FileError(int error, absl::string_view action, const std::string& path) {
  const absl::Status status =
      absl::ErrnoToStatus(error, absl::StrCat("cannot ", action, " ", path));
  return absl::Status(status.code(),
                      absl::StrCat(status.message(), "; check space and permissions there"));
}

absl::Status SyncDirectory(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return FileError(errno, "open directory", path);
  const int result = fsync(fd);
  const int error = errno;
  close(fd);
  return result == 0 ? absl::OkStatus() : FileError(error, "fsync directory", path);
}

std::string WithoutTrailingSlash(absl::string_view path) {
  while (path.size() > 1 && path.back() == '/') path.remove_suffix(1);
  return std::string(path);
}

std::string Parent(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

absl::Status RemoveTree(const std::string& path) {
  std::error_code error;
  std::filesystem::remove_all(path, error);
  return error ? FileError(error.value(), "remove", path) : absl::OkStatus();
}

}  // namespace

DurableFile::~DurableFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status DurableFile::Append(const void* data, int64_t size_bytes) {
  boundary_("write");
  hash_.Update(data, size_bytes);
  const char* next = static_cast<const char*>(data);
  int64_t left = size_bytes;
  while (left > 0) {
    const ssize_t written = write(fd_, next, static_cast<size_t>(std::min<int64_t>(left, 1 << 30)));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return FileError(errno, "write", path_);
    next += written;
    left -= written;
  }
  size_bytes_ += size_bytes;
  return absl::OkStatus();
}

absl::StatusOr<FileDigest> DurableFile::Finish() {
  boundary_("fsync file");
  if (fsync(fd_) != 0) return FileError(errno, "fsync", path_);
  const int fd = std::exchange(fd_, -1);
  if (close(fd) != 0) return FileError(errno, "close", path_);
  return FileDigest{.size_bytes = size_bytes_, .sha256 = hash_.Finish()};
}

AtomicDirectory::AtomicDirectory(std::string path, WriteBoundary boundary)
    : path_(std::move(path)),
      partial_path_(path_ + ".partial"),
      boundary_(boundary ? std::move(boundary) : [](absl::string_view) {}) {}

AtomicDirectory::~AtomicDirectory() {
  if (!committed_) RemoveTree(partial_path_).IgnoreError();
}

absl::StatusOr<std::unique_ptr<AtomicDirectory>> AtomicDirectory::Create(absl::string_view path,
                                                                         WriteBoundary boundary) {
  std::unique_ptr<AtomicDirectory> directory(
      new AtomicDirectory(WithoutTrailingSlash(path), std::move(boundary)));
  const std::string& partial = directory->partial_path_;
  std::error_code error;
  std::filesystem::create_directories(Parent(partial), error);
  if (error) return FileError(error.value(), "create directory", Parent(partial));
  directory->boundary_("remove left-over");
  RETURN_IF_ERROR(RemoveTree(partial));
  directory->boundary_("create directory");
  if (mkdir(partial.c_str(), 0755) != 0) return FileError(errno, "create directory", partial);
  return directory;
}

absl::StatusOr<std::unique_ptr<DurableFile>> AtomicDirectory::CreateFile(absl::string_view name) {
  const std::string path = absl::StrCat(partial_path_, "/", name);
  boundary_("create file");
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (fd < 0) return FileError(errno, "create", path);
  return std::make_unique<DurableFile>(path, fd, boundary_);
}

absl::Status AtomicDirectory::Exchange() {
  if (rename(partial_path_.c_str(), path_.c_str()) == 0) return absl::OkStatus();
  if (errno != ENOTEMPTY && errno != EEXIST) return FileError(errno, "rename to", path_);
  if (renameat2(AT_FDCWD, partial_path_.c_str(), AT_FDCWD, path_.c_str(), RENAME_EXCHANGE) == 0) {
    return absl::OkStatus();
  }
  if (errno == EINVAL || errno == ENOSYS || errno == ENOTSUP) {
    return absl::FailedPreconditionError(absl::StrCat(
        "replace ", path_, ": this file system cannot exchange directories; use a fresh path"));
  }
  return FileError(errno, "exchange", path_);
}

absl::Status AtomicDirectory::Commit() {
  boundary_("fsync directory");
  RETURN_IF_ERROR(SyncDirectory(partial_path_));
  boundary_("rename");
  RETURN_IF_ERROR(Exchange());
  committed_ = true;
  boundary_("fsync parent");
  RETURN_IF_ERROR(SyncDirectory(Parent(path_)));
  boundary_("remove former");
  return RemoveTree(partial_path_);  // after an exchange: the former directory
}

}  // namespace coppice
