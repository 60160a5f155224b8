#include "tests/server/engine/overlap_default.h"

namespace coppice {

const bool kOverlapByDefault = true;

}  // namespace coppice
