// The tables for x86-64: baseline (SSE2), v3 (AVX2, FMA) and v4 (AVX-512), as the psABI names them.
#include "kernels/base/x86_level.h"
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

std::vector<const Kernels*> SupportedKernels() {
  std::vector<const Kernels*> tables;
  if (HasX86V4()) tables.push_back(&x86_64_v4::kKernels);
  if (HasX86V3()) tables.push_back(&x86_64_v3::kKernels);
  tables.push_back(&baseline::kKernels);
  return tables;
}

const Kernels& SimdKernels() {
  static const Kernels& chosen = *SupportedKernels().front();
  return chosen;
}

}  // namespace coppice::cpu
