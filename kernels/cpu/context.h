// What every CPU op needs besides its tensors: threads and scratch memory that is
// kept between calls. Owned by CpuOps; used by one op at a time.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "kernels/cpu/thread_pool.h"

namespace coppice::cpu {

class Context {
 public:
  explicit Context(int num_threads) : pool_(num_threads) {}

  ThreadPool& pool() { return pool_; }
  int num_threads() const { return pool_.num_threads(); }

  // At least `n` floats, 64-byte aligned, contents undefined; valid until the next call. An op asks
  // once and divides the memory itself. Grows, never shrinks.
  float* Scratch(int64_t n);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };

  ThreadPool pool_;
  int64_t scratch_size_ = 0;
  std::unique_ptr<float, Free> scratch_;
};

}  // namespace coppice::cpu
