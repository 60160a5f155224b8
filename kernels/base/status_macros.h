// RETURN_IF_ERROR and ASSIGN_OR_RETURN with the names and meaning of absl/status/status_macros.h,
// which Debian 12's Abseil does not have yet. A newer Abseil replaces this file by one include
// line.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define RETURN_IF_ERROR(expr)               \
  do {                                      \
    absl::Status coppice_status_ = (expr);  \
    if (!coppice_status_.ok()) [[unlikely]] \
      return coppice_status_;               \
  } while (false)

#define COPPICE_CONCAT_INNER(a, b) a##b
#define COPPICE_CONCAT(a, b) COPPICE_CONCAT_INNER(a, b)

#define ASSIGN_OR_RETURN(lhs, expr) \
  COPPICE_ASSIGN_OR_RETURN(COPPICE_CONCAT(coppice_statusor_, __LINE__), lhs, expr)

#define COPPICE_ASSIGN_OR_RETURN(var, lhs, expr) \
  auto var = (expr);                             \
  if (!var.ok()) [[unlikely]]                    \
    return std::move(var).status();              \
  lhs = std::move(var).value()
