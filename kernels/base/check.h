// CHECK macros for broken invariants: print the expression and both operands with file and line,
// then abort. Never reachable from a client's bytes; expected errors are absl::Status. Same names
// and meaning as absl/log/check.h, which Debian 12's Abseil does not have yet.
#pragma once

#include <sstream>
#include <string>

namespace coppice::internal {

[[noreturn]] void CheckFailed(const char* file, int line, const std::string& message);

// Collects the text streamed into a failing CHECK and aborts in its destructor.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const std::string& what) : file_(file), line_(line) {
    stream_ << what << ' ';
  }
  [[noreturn]] ~CheckFailure() { CheckFailed(file_, line_, stream_.str()); }
  std::ostream& stream() { return stream_; }

 private:
  const char* file_;
  int line_;
  std::ostringstream stream_;
};

template <typename A, typename B>
std::string CheckOpMessage(const char* expr, const A& a, const B& b) {
  std::ostringstream s;
  s << "CHECK failed: " << expr << " (" << a << " vs " << b << ")";
  return s.str();
}

}  // namespace coppice::internal

#define CHECK(cond)                                                                          \
  while (!(cond))                                                                            \
  [[unlikely]] ::coppice::internal::CheckFailure(__FILE__, __LINE__, "CHECK failed: " #cond) \
      .stream()

#define COPPICE_CHECK_OP(op, a, b)                                                          \
  while (!((a)op(b)))                                                                       \
  [[unlikely]] ::coppice::internal::CheckFailure(                                           \
      __FILE__, __LINE__, ::coppice::internal::CheckOpMessage(#a " " #op " " #b, (a), (b))) \
      .stream()

#define CHECK_EQ(a, b) COPPICE_CHECK_OP(==, a, b)
#define CHECK_NE(a, b) COPPICE_CHECK_OP(!=, a, b)
#define CHECK_LT(a, b) COPPICE_CHECK_OP(<, a, b)
#define CHECK_LE(a, b) COPPICE_CHECK_OP(<=, a, b)
#define CHECK_GT(a, b) COPPICE_CHECK_OP(>, a, b)
#define CHECK_GE(a, b) COPPICE_CHECK_OP(>=, a, b)
#define CHECK_OK(expr)                                         \
  do {                                                         \
    const auto check_ok_status = (expr);                       \
    CHECK(check_ok_status.ok()) << check_ok_status.ToString(); \
  } while (false)
