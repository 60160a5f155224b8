#include "server/engine/step_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <system_error>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "kernels/base/log.h"

namespace coppice {
namespace {

// The number in "step-<n>" and "step-<n>.json"; -1 for any other name.
int64_t NumberIn(absl::string_view name) {
  int64_t number = -1;
  if (!absl::ConsumePrefix(&name, "step-")) return -1;
  absl::ConsumeSuffix(&name, ".json");
  return absl::SimpleAtoi(name, &number) ? number : -1;
}

absl::Status FileError(absl::string_view what, const std::string& path) {
  return absl::UnavailableError(absl::StrCat("cannot ", what, " ", path));
}

bool WriteAll(int fd, const std::string& text) {
  for (size_t at = 0; at < text.size();) {
    const ssize_t n = write(fd, text.data() + at, text.size() - at);
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

std::optional<StepLog::Entry> StepLog::Newest() const {
  int64_t newest = -1;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(directory_, error)) {
    if (file.is_directory(error))
      newest = std::max(newest, NumberIn(file.path().filename().string()));
  }
  if (newest < 0) return std::nullopt;
  return At(newest);
}

StepLog::Entry StepLog::Next() const {
  const std::optional<Entry> newest = Newest();
  return At(newest.has_value() ? newest->number + 1 : 0);
}

void StepLog::RemoveOthers(const Entry& entry) const {
  std::error_code error;
  std::vector<std::filesystem::path> old;
  for (const auto& file : std::filesystem::directory_iterator(directory_, error)) {
    const int64_t number = NumberIn(file.path().filename().string());
    if (number >= 0 && number != entry.number) old.push_back(file.path());
  }
  for (const std::filesystem::path& path : old) {
    std::filesystem::remove_all(path, error);
    if (error) LOG(WARNING) << "step_log_not_removed path=" << path.string();
  }
}

absl::Status WriteSynced(const std::string& path, const std::string& text) {
  const std::string temporary = path + ".tmp";
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return FileError("create", temporary);
  const bool written = WriteAll(fd, text);
  if (close(fd) != 0 || !written) return FileError("write", temporary);
  if (std::rename(temporary.c_str(), path.c_str()) != 0) return FileError("rename", temporary);
  return absl::OkStatus();
}

}  // namespace coppice
