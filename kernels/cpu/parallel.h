// ParallelFor and ParallelRanges: the two ways in which CPU ops use threads (OpenMP, the pool that
// oneDNN uses as well). Which thread runs an item is up to timing, so an item must not share sums
// with another item: that keeps results equal from run to run and for every number of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace coppice::cpu {

// fn(item, thread) for each item in [0, n), thread in [0, num_threads); items are handed out one by
// one, in order.
template <typename Fn>
void ParallelFor(int num_threads, int64_t n, const Fn& fn) {
  if (num_threads == 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) fn(i, 0);
    return;
  }
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) fn(i, omp_get_thread_num());
}

// fn(begin, end) over ranges of `grain` items that cover [0, n).
template <typename Fn>
void ParallelRanges(int num_threads, int64_t n, int64_t grain, const Fn& fn) {
  ParallelFor(num_threads, (n + grain - 1) / grain,
              [&](int64_t i, int) { fn(i * grain, std::min(n, (i + 1) * grain)); });
}

}  // namespace coppice::cpu
