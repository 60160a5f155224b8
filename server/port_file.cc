#include "server/port_file.h"

#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "absl/strings/str_cat.h"

namespace coppice {

absl::Status WritePortFile(const std::string& path, int grpc_port, int http_port) {
  if (path.empty()) return absl::OkStatus();
  const std::string temporary = path + ".tmp";
  {
    std::ofstream file(temporary, std::ios::trunc);
    file << "{\"grpc\": " << grpc_port << ", \"http\": " << http_port << ", \"pid\": " << getpid()
         << "}\n";
    if (!file.flush()) {
      return absl::UnavailableError(absl::StrCat("port file not written: want ", temporary,
                                                 " writable, got an error; change --port_file"));
    }
  }
  if (std::rename(temporary.c_str(), path.c_str()) == 0) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("port file not written: want ", path,
                                             " replaceable, got an error; change --port_file"));
}

}  // namespace coppice
