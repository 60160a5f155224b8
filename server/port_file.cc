#include "server/port_file.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace coppice {
namespace {

// By errno.
absl::Status NotWritten(const std::string& path, const char* want) {
  const std::string got = std::generic_category().message(errno);
  return absl::UnavailableError(absl::StrCat("port file not written: want ", path, " ", want,
                                             ", got ", got, "; change --port_file"));
}

}  // namespace

absl::Status RemovePortFile(const std::string& path) {
  if (path.empty() || unlink(path.c_str()) == 0 || errno == ENOENT) return absl::OkStatus();
  return NotWritten(path, "replaceable");
}

absl::Status WritePortFile(const std::string& path, int grpc_port, int http_port) {
  if (path.empty()) return absl::OkStatus();
  const std::string temporary = path + ".tmp";
  {
    std::ofstream file(temporary, std::ios::trunc);
    file << "{\"grpc\": " << grpc_port << ", \"http\": " << http_port << ", \"pid\": " << getpid()
         << "}\n";
    if (!file.flush()) {
      return NotWritten(temporary, "writable");
    }
  }
  if (std::rename(temporary.c_str(), path.c_str()) == 0) return absl::OkStatus();
  return NotWritten(path, "replaceable");
}

}  // namespace coppice
