// AtomicDirectory: a directory that appears at its path whole or not at all. Files are written into
// `<path>.partial`, each fsynced; Commit fsyncs the directory, moves it to `path` in one step (an
// exchange if a directory is there) and fsyncs the parent. After a crash `path` is the former or
// the new directory; a left-over `.partial` is removed by the next Create.
//
// Thread: one. Errors: those of the file system (RESOURCE_EXHAUSTED when full), naming the path.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "trainer/sha256.h"

namespace coppice {

// Called before each change of the file system with its name, e.g. "rename". Tests stop the process
// there.
using WriteBoundary = std::function<void(absl::string_view)>;

struct FileDigest {
  int64_t size_bytes = 0;
  std::string sha256;  // 64 hex digits
};

// A file being written. Not closed by Finish: its data may be lost.
class DurableFile {
 public:
  DurableFile(std::string path, int fd, const WriteBoundary& boundary)
      : path_(std::move(path)), fd_(fd), boundary_(boundary) {}
  DurableFile(const DurableFile&) = delete;
  DurableFile& operator=(const DurableFile&) = delete;
  ~DurableFile();

  absl::Status Append(const void* data, int64_t size_bytes);
  // Flushes to the disk and closes.
  absl::StatusOr<FileDigest> Finish();

 private:
  std::string path_;
  int fd_;
  const WriteBoundary& boundary_;
  int64_t size_bytes_ = 0;
  Sha256 hash_;
};

class AtomicDirectory {
 public:
  static absl::StatusOr<std::unique_ptr<AtomicDirectory>> Create(absl::string_view path,
                                                                 WriteBoundary boundary);
  ~AtomicDirectory();  // without Commit: removes the partial directory

  absl::StatusOr<std::unique_ptr<DurableFile>> CreateFile(absl::string_view name);
  absl::Status Commit();

 private:
  AtomicDirectory(std::string path, WriteBoundary boundary);
  absl::Status Exchange();

  std::string path_;
  std::string partial_path_;
  WriteBoundary boundary_;
  bool committed_ = false;
};

}  // namespace coppice
