# Writes OUT, a header with the commit that is being built ("-dirty" if the tree differs), only when it has changed.
execute_process(COMMAND git -C ${SOURCE_DIR} describe --always --dirty --exclude=* OUTPUT_VARIABLE commit
                OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT commit)
  set(commit unknown)
endif()
file(CONFIGURE OUTPUT ${OUT} @ONLY CONTENT [[
#pragma once
namespace coppice::bench {
inline constexpr char kCommit[] = "@commit@";
}
]])
