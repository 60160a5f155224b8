// LOG(INFO|WARNING|ERROR) << "event key=value ...": one event per line on stderr. absl/log's names
// over spdlog. REPORT_BUG: suspicious but survivable; logs, counts, and aborts in debug builds. Any
// thread.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

namespace coppice {

enum class LogSeverity { kInfo, kWarning, kError };

// Messages below `level` are dropped. Default: kInfo.
void SetMinLogSeverity(LogSeverity level);

// How often REPORT_BUG ran in this process.
int64_t NumBugsReported();

namespace internal {

class LogLine {
 public:
  LogLine(LogSeverity severity) : severity_(severity) {}  // NOLINT(google-explicit-constructor)
  LogLine(const LogLine&) = delete;
  LogLine& operator=(const LogLine&) = delete;
  ~LogLine();
  std::ostream& stream() { return stream_; }

 private:
  LogSeverity severity_;
  std::ostringstream stream_;
};

void ReportBug(const char* file, int line, const std::string& message);

}  // namespace internal
}  // namespace coppice

#define COPPICE_SEVERITY_INFO ::coppice::LogSeverity::kInfo
#define COPPICE_SEVERITY_WARNING ::coppice::LogSeverity::kWarning
#define COPPICE_SEVERITY_ERROR ::coppice::LogSeverity::kError
#define LOG(severity) ::coppice::internal::LogLine(COPPICE_SEVERITY_##severity).stream()
#define REPORT_BUG(message) ::coppice::internal::ReportBug(__FILE__, __LINE__, (message))
