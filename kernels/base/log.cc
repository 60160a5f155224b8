#include "kernels/base/log.h"

#include <atomic>
#include <cstdlib>

#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace coppice {
namespace {

std::atomic<int64_t> bugs_reported{0};

spdlog::logger& Logger() {
  static auto* logger = [] {
    auto* l = new spdlog::logger("coppice", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    l->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %l %v");
    return l;
  }();
  return *logger;
}

spdlog::level::level_enum ToSpdlog(LogSeverity severity) {
  switch (severity) {
    case LogSeverity::kInfo:
      return spdlog::level::info;
    case LogSeverity::kWarning:
      return spdlog::level::warn;
    case LogSeverity::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

}  // namespace

void SetMinLogSeverity(LogSeverity level) { Logger().set_level(ToSpdlog(level)); }

int64_t NumBugsReported() { return bugs_reported.load(); }

namespace internal {

LogLine::~LogLine() { Logger().log(ToSpdlog(severity_), "{}", stream_.str()); }

void ReportBug(const char* file, int line, const std::string& message) {
  bugs_reported.fetch_add(1);
  LOG(ERROR) << "bug at=" << file << ':' << line << ' ' << message;
#ifndef NDEBUG
  std::abort();
#endif
}

}  // namespace internal
}  // namespace coppice
