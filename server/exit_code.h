// Exit codes of coppiced: what a supervisor may conclude.
#pragma once

namespace coppice {

enum class ExitCode {
  kDrained = 0,       // SIGTERM or SIGINT, everything answered
  kRuntimeError = 1,  // system failure: restart
  kBadFlags = 2,      // do not restart, change the flags
  kModelError = 3,    // model missing, corrupt, too large for the memory or not for the device
  kPortTaken = 4,     // another process listens there
  kNotDrained = 5,    // stopped while requests were open: second signal or drain timeout
  kDeviceError = 6,   // no device, or it failed: restart, elsewhere if it happens again
};

}  // namespace coppice
