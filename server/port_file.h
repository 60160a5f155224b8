// The file that tells scripts where a process listens, once it is ready.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace coppice {

// {"grpc": port, "http": port, "pid": id} under `path`, by rename: readers see the whole file or
// none. Nothing if `path` is empty. UNAVAILABLE if it cannot be written.
absl::Status WritePortFile(const std::string& path, int grpc_port, int http_port);

}  // namespace coppice
