#include "server/engine/step_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"

namespace coppice {
namespace {

// The number in "step-<n>" and "step-<n>.json"; -1 for any other name.
int64_t NumberIn(absl::string_view name) {
  int64_t number = -1;
  if (!absl::ConsumePrefix(&name, "step-")) return -1;
  absl::ConsumeSuffix(&name, ".json");
  return absl::SimpleAtoi(name, &number) ? number : -1;
}

absl::Status FileError(absl::string_view what, const std::string& path, int error) {
  return absl::UnavailableError(absl::StrCat("cannot ", what, " ", path, ": ",
                                             std::generic_category().message(error),
                                             "; check space and permissions there"));
}

absl::StatusOr<std::vector<std::filesystem::directory_entry>> List(const std::string& directory) {
  std::vector<std::filesystem::directory_entry> entries;
  std::error_code error;
  std::filesystem::directory_iterator file(directory, error);
  for (; !error && file != std::filesystem::directory_iterator(); file.increment(error)) {
    entries.push_back(*file);
  }
  if (error) return FileError("read directory", directory, error.value());
  return entries;
}

// By errno.
bool WriteAll(int fd, const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t n = write(fd, text.data() + at, text.size() - at);
    if (n == 0) errno = EIO;
    if (n <= 0) return false;
    at += static_cast<size_t>(n);
  }
  return fsync(fd) == 0;
}

}  // namespace

StepLog::Entry StepLog::At(int64_t number) const {
  const std::string path = absl::StrFormat("%s/step-%08d", directory_, number);
  return {number, path, path + ".json"};
}

absl::StatusOr<std::optional<StepLog::Entry>> StepLog::Newest() const {
  ASSIGN_OR_RETURN(const auto files, List(directory_));
  int64_t newest = -1;
  std::error_code error;
  for (const auto& file : files) {
    if (file.is_directory(error))
      newest = std::max(newest, NumberIn(file.path().filename().string()));
  }
  if (newest < 0) return std::nullopt;
  return At(newest);
}

absl::StatusOr<StepLog::Entry> StepLog::Next() const {
  ASSIGN_OR_RETURN(const std::optional<Entry> newest, Newest());
  return At(newest.has_value() ? newest->number + 1 : 0);
}

void StepLog::RemoveOthers(const Entry& entry) const {
  const auto files = List(directory_);
  if (!files.ok()) {
    LOG(WARNING) << "step_log_not_removed reason=\"" << files.status().message() << '"';
    return;
  }
  for (const auto& file : *files) {
    const int64_t number = NumberIn(file.path().filename().string());
    if (number < 0 || number == entry.number) continue;
    std::error_code error;
    std::filesystem::remove_all(file.path(), error);
    if (error) {
      LOG(WARNING) << "step_log_not_removed path=" << file.path().string() << " reason=\""
                   << error.message() << '"';
    }
  }
}

absl::Status WriteSynced(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".tmp";
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return FileError("create", temporary, errno);
  const int error = WriteAll(fd, text) ? 0 : errno;
  if (close(fd) != 0 || error != 0) {
    return FileError("write", temporary, error != 0 ? error : errno);
  }
  if (std::rename(temporary.c_str(), path.c_str()) != 0) {
    return FileError("rename", temporary, errno);
  }
  return absl::OkStatus();
}

}  // namespace coppice
