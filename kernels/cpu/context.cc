#include "kernels/cpu/context.h"

#include "kernels/base/check.h"

namespace coppice::cpu {

float* Context::Scratch(int64_t n) {
  if (n > scratch_size_) {
    const int64_t rounded = (n + 1023) / 1024 * 1024;
    scratch_.reset();
    scratch_.reset(static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float))));
    CHECK(scratch_ != nullptr) << "out of memory for " << rounded << " floats of scratch";
    scratch_size_ = rounded;
  }
  return scratch_.get();
}

}  // namespace coppice::cpu
