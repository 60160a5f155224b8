// coppiced: see HelpText() in config.cc for flags and exit codes.
#include <cstdlib>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/log.h"
#include "kernels/ops/ops.h"
#include "server/config.h"
#include "server/daemon.h"
#include "server/exit_code.h"
#include "server/router_daemon.h"

namespace coppice {
namespace {

std::optional<std::string> Environment(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

LogSeverity Severity(const std::string& level) {
  if (level == "error") return LogSeverity::kError;
  return level == "warning" ? LogSeverity::kWarning : LogSeverity::kInfo;
}

absl::StatusOr<std::unique_ptr<ops::Ops>> OpenDevice(const Config& config, DType compute_dtype) {
  return ops::CreateOps(config.device, static_cast<int>(config.threads), config.deterministic,
                        compute_dtype,
                        {.path = config.matmul_cache, .grows = config.matmul_cache_grows});
}

ExitCode Main(const std::vector<std::string>& args) {
  absl::StatusOr<Config> config = ParseConfig(args, Environment);
  if (!config.ok()) {
    std::cerr << "coppiced: " << config.status().message() << '\n';
    return ExitCode::kBadFlags;
  }
  if (config->help || config->version) {
    std::cout << (config->help ? HelpText() : "coppiced " COPPICE_VERSION "\n");
    return ExitCode::kDrained;
  }
  SetMinLogSeverity(Severity(config->log_level));
  if (config->role == "router") return RouterDaemon(*std::move(config)).Run();
  return Daemon(*std::move(config), OpenDevice).Run();
}

}  // namespace
}  // namespace coppice

int main(int argc, char** argv) {
  return static_cast<int>(coppice::Main(std::vector<std::string>(argv + 1, argv + argc)));
}
