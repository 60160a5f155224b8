#include "tests/support/daemon_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>

#include "kernels/base/check.h"

namespace coppice {
namespace {

// The number after `key` in a line "... grpc=127.0.0.1:41234 ...".
int PortAfter(const std::string& line, const std::string& key) {
  const size_t at = line.find(key);
  return at == std::string::npos ? 0 : std::atoi(line.c_str() + line.find(':', at) + 1);
}

}  // namespace

DaemonProcess::DaemonProcess(const std::string& binary, std::vector<std::string> args) {
  int ends[2];
  CHECK_EQ(pipe2(ends, O_CLOEXEC), 0);
  std::vector<char*> argv = {const_cast<char*>(binary.c_str())};
  for (std::string& arg : args) argv.push_back(arg.data());
  argv.push_back(nullptr);
  pid_ = fork();
  CHECK_GE(pid_, 0);
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // never outlives the test
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  close(ends[1]);
  pipe_ = ends[0];
}

DaemonProcess::~DaemonProcess() {
  if (!ended_) {
    Signal(SIGKILL);
    Wait();
  }
  close(pipe_);
}

bool DaemonProcess::ReadLine(std::string* line) {
  for (;;) {
    const size_t newline = buffer_.find('\n');
    if (newline != std::string::npos) {
      *line = buffer_.substr(0, newline);
      buffer_.erase(0, newline + 1);
      return true;
    }
    char bytes[4096];
    const ssize_t n = read(pipe_, bytes, sizeof(bytes));
    if (n <= 0) return false;
    buffer_.append(bytes, n);
    log_.append(bytes, n);
  }
}

std::string DaemonProcess::AwaitLine(const std::string& text) {
  std::string line;
  while (ReadLine(&line)) {
    if (line.find(text) != std::string::npos) return line;
  }
  return "";
}

bool DaemonProcess::AwaitReady() {
  const std::string line = AwaitLine(" ready grpc=");
  grpc_port_ = PortAfter(line, "grpc=");
  http_port_ = PortAfter(line, "http=");
  return !line.empty();
}

void DaemonProcess::Signal(int signal) { kill(pid_, signal); }

void DaemonProcess::Freeze() {
  Signal(SIGSTOP);
  int status = 0;
  CHECK_EQ(waitpid(pid_, &status, WUNTRACED), pid_);
  CHECK(WIFSTOPPED(status));
}

int64_t DaemonProcess::ResidentBytes() const {
  std::ifstream statm("/proc/" + std::to_string(pid_) + "/statm");
  int64_t size = 0, resident = 0;
  statm >> size >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

double DaemonProcess::CpuSeconds() const {
  std::ifstream stat("/proc/" + std::to_string(pid_) + "/stat");
  std::string text((std::istreambuf_iterator<char>(stat)), {});
  // Fields 14 and 15; the name in field 2 may hold spaces.
  std::istringstream fields(text.substr(text.rfind(')') + 2));
  std::string skipped;
  for (int field = 3; field < 14; ++field) fields >> skipped;
  double user = 0, system = 0;
  fields >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

int DaemonProcess::Wait() {
  if (ended_) return exit_;
  std::string line;
  while (ReadLine(&line)) {
  }
  int status = 0;
  CHECK_EQ(waitpid(pid_, &status, 0), pid_);
  ended_ = true;
  exit_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  return exit_;
}

}  // namespace coppice
