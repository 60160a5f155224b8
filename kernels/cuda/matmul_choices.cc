#include "kernels/cuda/matmul_choices.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"

namespace coppice::cuda {
namespace {

constexpr absl::string_view kFormat = "coppice matmul choices, format 1";

// By errno.
absl::Status Failed(absl::string_view what, const std::string& path) {
  return absl::FailedPreconditionError(
      absl::StrCat("matmul cache not ", what, ": want a writable ", path, ", got ",
                   std::generic_category().message(errno), "; change --matmul_cache"));
}

std::string DirectoryOf(const std::string& path) {
  const std::string directory = std::filesystem::path(path).parent_path().string();
  return directory.empty() ? "." : directory;
}

// Held while a process reads the file and replaces it. On the directory: the file is another one
// afterwards.
class DirectoryLock {
 public:
  explicit DirectoryLock(const std::string& directory)
      : file_(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)),
        held_(file_ >= 0 && flock(file_, LOCK_EX) == 0) {}
  ~DirectoryLock() {
    if (file_ >= 0) close(file_);
  }
  DirectoryLock(const DirectoryLock&) = delete;
  DirectoryLock& operator=(const DirectoryLock&) = delete;
  bool held() const { return held_; }

 private:
  const int file_;
  const bool held_;
};

// Whether the operator lets processes write it. Permission bits are asked for, too: they do not
// stop root.
bool MayWrite(const std::string& path) {
  struct stat status = {};
  return stat(path.c_str(), &status) == 0 && (status.st_mode & 0222) != 0 &&
         access(path.c_str(), W_OK) == 0 && access(DirectoryOf(path).c_str(), W_OK) == 0;
}

// FNV-1a: finds what an editor or a full disk has done, before the library is given such words.
uint64_t Checksum(absl::string_view text) {
  uint64_t sum = 0xcbf29ce484222325;
  for (const char c : text) sum = (sum ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return sum;
}

std::string LineOf(absl::string_view kind, const MatMulChoice& c) {
  const std::string words = absl::StrJoin(
      c.words, ",", [](std::string* out, uint64_t w) { absl::StrAppendFormat(out, "%x", w); });
  return absl::StrFormat("%s : first_us=%.2f chosen_us=%.2f algorithm=%s words=%s\n", kind,
                         c.first_us, c.chosen_us, c.algorithm, words);
}

bool ParseWords(absl::string_view text, std::array<uint64_t, 8>& words) {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ',');
  if (parts.size() != words.size()) return false;
  for (size_t i = 0; i < words.size(); ++i) {
    if (!absl::SimpleHexAtoi(parts[i], &words[i])) return false;
  }
  return true;
}

bool ParseChoice(absl::string_view text, MatMulChoice& c) {
  const std::vector<absl::string_view> fields = absl::StrSplit(text, ' ');
  if (fields.size() != 4) return false;
  absl::string_view first = fields[0], chosen = fields[1], algorithm = fields[2], words = fields[3];
  if (!absl::ConsumePrefix(&first, "first_us=") || !absl::ConsumePrefix(&chosen, "chosen_us=") ||
      !absl::ConsumePrefix(&algorithm, "algorithm=") || !absl::ConsumePrefix(&words, "words=")) {
    return false;
  }
  c.algorithm = std::string(algorithm);
  return absl::SimpleAtod(first, &c.first_us) && absl::SimpleAtod(chosen, &c.chosen_us) &&
         ParseWords(words, c.words);
}

absl::Status Broken(absl::string_view want, absl::string_view got) {
  return absl::InvalidArgumentError(absl::StrCat("want ", want, ", got ", got.substr(0, 100)));
}

}  // namespace

absl::StatusOr<MatMulChoices::Map> MatMulChoices::Read() const {
  std::ifstream file(path_);
  if (!file && errno == ENOENT) return absl::NotFoundError(path_);
  std::stringstream buffer;
  buffer << file.rdbuf();
  const std::string text = buffer.str();
  if (!file) return Failed("read", path_);
  std::vector<absl::string_view> lines = absl::StrSplit(text, '\n');
  if (lines[0] != kFormat) return Broken(kFormat, lines[0]);
  if (lines.size() < 4 || !lines.back().empty())
    return Broken("a last line: end SUM", lines.back());
  if (lines[1] != library_) {
    return absl::FailedPreconditionError(absl::StrCat("want ", library_, ", got ", lines[1]));
  }
  const absl::string_view end = lines[lines.size() - 2];
  const std::string want = absl::StrFormat("end %x", Checksum(text.substr(0, text.rfind("end "))));
  if (end != want) return Broken(absl::StrCat(want, " for what stands before it"), end);
  Map choices;
  for (size_t i = 2; i + 2 < lines.size(); ++i) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(lines[i], absl::MaxSplits(" : ", 1));
    MatMulChoice choice;
    if (!ParseChoice(parts.second, choice)) return Broken("KIND : CHOICE", lines[i]);
    choices.emplace(parts.first, choice);
  }
  return choices;
}

// In the order of kinds, so that files can be compared.
absl::Status MatMulChoices::Write(const Map& choices) const {
  std::vector<std::string> lines;
  for (const auto& [kind, choice] : choices) lines.push_back(LineOf(kind, choice));
  std::sort(lines.begin(), lines.end());
  std::string text = absl::StrCat(kFormat, "\n", library_, "\n", absl::StrJoin(lines, ""));
  absl::StrAppendFormat(&text, "end %x\n", Checksum(text));
  const std::string temporary = path_ + ".tmp";
  const int file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file < 0) return Failed("written", temporary);
  const bool written = write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size()) &&
                       fsync(file) == 0;
  close(file);
  if (written && std::rename(temporary.c_str(), path_.c_str()) == 0) return absl::OkStatus();
  const absl::Status status = Failed("written", path_);
  unlink(temporary.c_str());
  return status;
}

absl::StatusOr<std::unique_ptr<MatMulChoices>> MatMulChoices::Open(const ops::MatMulCacheFile& file,
                                                                   std::string library) {
  std::unique_ptr<MatMulChoices> choices(new MatMulChoices(file.path, std::move(library)));
  const DirectoryLock lock(DirectoryOf(file.path));
  absl::StatusOr<Map> read = choices->Read();
  if (absl::IsNotFound(read.status()) && !file.grows) {
    return absl::FailedPreconditionError(
        absl::StrCat("matmul cache not read: want a file at ", file.path,
                     ", got none; let it grow once or change --matmul_cache"));
  }
  if (absl::IsNotFound(read.status())) {
    if (!lock.held()) return Failed("locked", DirectoryOf(file.path));
    RETURN_IF_ERROR(choices->Write({}));
    read = Map{};
  }
  if (!read.ok()) {
    LOG(WARNING) << "matmul_cache_ignored file=" << choices->path_ << " reason=\""
                 << read.status().message()
                 << "\" note=\"the file stays, products run by the library's first choice; remove "
                    "it and let it grow again, or change --matmul_cache\"";
    return choices;
  }
  choices->choices_ = *std::move(read);
  choices->takes_more_ = file.grows && lock.held() && MayWrite(choices->path_);
  LOG(INFO) << "matmul_cache file=" << choices->path_ << " choices=" << choices->size()
            << " takes_more=" << (choices->takes_more_ ? "yes" : "no");
  return choices;
}

const MatMulChoice* MatMulChoices::Find(absl::string_view kind) const {
  const auto found = choices_.find(kind);
  return found == choices_.end() ? nullptr : &found->second;
}

// Our own choices are in the file already, unless somebody has removed it.
absl::Status MatMulChoices::Add(absl::string_view kind, const MatMulChoice& choice) {
  const DirectoryLock lock(DirectoryOf(path_));
  if (!lock.held()) return Failed("locked", DirectoryOf(path_));
  absl::StatusOr<Map> in_file = Read();
  if (absl::IsNotFound(in_file.status())) in_file = choices_;
  RETURN_IF_ERROR(in_file.status());
  const auto [standing, is_new] = in_file->try_emplace(kind, choice);
  if (is_new) RETURN_IF_ERROR(Write(*in_file));
  choices_.insert_or_assign(kind, standing->second);
  return absl::OkStatus();
}

const MatMulChoice* MatMulChoices::Keep(absl::string_view kind, const MatMulChoice& choice) {
  if (!takes_more_) return nullptr;
  const absl::Status added = Add(kind, choice);
  if (added.ok()) return Find(kind);
  takes_more_ = false;
  LOG(WARNING) << "matmul_cache_not_written reason=\"" << added.message()
               << "\" note=\"what is in it counts, other products run by the library's first "
                  "choice until the process starts again\"";
  return nullptr;
}

}  // namespace coppice::cuda
