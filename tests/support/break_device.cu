#include "tests/support/break_device.h"

#include <cuda_runtime.h>

namespace coppice {
namespace {

__global__ void TrapKernel() { __trap(); }

}  // namespace

void BreakDevice() {
  const cudaStream_t stream = nullptr;
  TrapKernel<<<1, 1, 0, stream>>>();
  cudaDeviceSynchronize();
}

}  // namespace coppice
