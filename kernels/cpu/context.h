// What every CPU op needs besides its tensors: the number of threads and scratch memory that is
// kept between calls. Owned by CpuOps; used by one op at a time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace coppice::cpu {

class Context {
 public:
  explicit Context(int num_threads) : num_threads_(num_threads) {}

  int num_threads() const { return num_threads_; }

  // At least `n` floats, 64-byte aligned, contents undefined; valid until the next call. An op asks
  // once and divides the memory itself. Grows, never shrinks.
  float* Scratch(int64_t n);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };

  int num_threads_;
  int64_t scratch_size_ = 0;
  std::unique_ptr<float, Free> scratch_;
};

}  // namespace coppice::cpu
