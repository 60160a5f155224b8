// The widest table that this x86-64 processor can run.
#include "kernels/cpu/simd/kernels.h"

namespace coppice::cpu {

namespace baseline {
extern const Kernels kKernels;
}
namespace x86_64_v3 {
extern const Kernels kKernels;
}
namespace x86_64_v4 {
extern const Kernels kKernels;
}

const Kernels& SimdKernels() {
  static const Kernels& chosen = __builtin_cpu_supports("x86-64-v4")   ? x86_64_v4::kKernels
                                 : __builtin_cpu_supports("x86-64-v3") ? x86_64_v3::kKernels
                                                                       : baseline::kKernels;
  return chosen;
}

}  // namespace coppice::cpu
