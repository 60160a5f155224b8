// Processors other than x86-64: the one table, four lanes wide.
#include "kernels/cpu/simd/kernels.h"

namespace coppice::cpu {

namespace baseline {
extern const Kernels kKernels;
}

const Kernels& SimdKernels() { return baseline::kKernels; }

}  // namespace coppice::cpu
