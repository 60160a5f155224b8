#include "tests/support/break_device.h"

namespace coppice {

void BreakDevice() {}

}  // namespace coppice
