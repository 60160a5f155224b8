// Whether the engines of a test binary queue a step before the one before it is read: the suites
// run in both ways, linked with overlap_off.cc or overlap_on.cc.
#pragma once

namespace coppice {

extern const bool kOverlapByDefault;

}  // namespace coppice
