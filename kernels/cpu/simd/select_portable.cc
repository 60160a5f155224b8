// Processors other than x86-64: the one table, four lanes wide.
#include "kernels/cpu/simd/kernels.h"

namespace coppice::cpu {

namespace baseline {
extern const Kernels kKernels;
}

std::vector<const Kernels*> SupportedKernels() { return {&baseline::kKernels}; }

const Kernels& SimdKernels() { return baseline::kKernels; }

}  // namespace coppice::cpu
