// BreakDevice: makes the GPU of this process fail for good, as a faulty kernel would.
#pragma once

namespace coppice {

// Runs a kernel that traps and waits for it. Without CUDA in the build: nothing.
void BreakDevice();

}  // namespace coppice
