// DaemonProcess: a real coppiced, spawned on free ports, its log read line by line. No polling: the
// test waits for lines and for the exit.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <string>
#include <vector>

namespace coppice {

class DaemonProcess {
 public:
  // Starts `binary` with `args`; does not wait.
  DaemonProcess(const std::string& binary, std::vector<std::string> args);
  // Kills what still runs.
  ~DaemonProcess();
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  // Reads the log up to the next line that contains `text` and returns it; empty if the process
  // ended before.
  std::string AwaitLine(const std::string& text);
  // Waits for the ready line; false if the process ended before.
  bool AwaitReady();
  int grpc_port() const { return grpc_port_; }
  int http_port() const { return http_port_; }

  void Signal(int signal);
  // Stops all its threads, as a hanging machine would; returns once they stand. SIGCONT ends it.
  void Freeze();
  // Memory of the process that is in RAM.
  int64_t ResidentBytes() const;
  // User and system time of all its threads so far.
  double CpuSeconds() const;
  // Waits for the end: the exit code, or minus the signal that killed it.
  int Wait();
  // Everything logged so far, stdout included.
  const std::string& log() const { return log_; }
  // The part of log() that the waits above have passed.
  std::string lines_read() const { return log_.substr(0, log_.size() - buffer_.size()); }

 private:
  bool ReadLine(std::string* line);

  pid_t pid_ = -1;
  int pipe_ = -1;
  bool ended_ = false;
  int exit_ = 0;
  std::string log_, buffer_;
  int grpc_port_ = 0, http_port_ = 0;
};

}  // namespace coppice
