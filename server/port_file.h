// The file that tells scripts where a process listens, once it is ready.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace coppice {

// Removes what an earlier run has left under `path`: the file's presence says that this one is
// ready. UNAVAILABLE if it cannot be removed.
absl::Status RemovePortFile(const std::string& path);

// {"grpc": port, "http": port, "pid": id} under `path`, by rename: readers see the whole file or
// none. Nothing if `path` is empty. UNAVAILABLE if it cannot be written.
absl::Status WritePortFile(const std::string& path, int grpc_port, int http_port);

}  // namespace coppice
