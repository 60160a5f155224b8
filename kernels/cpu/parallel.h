// ParallelFor and ParallelRanges: the two ways in which CPU ops use threads. Which thread runs an
// item is up to timing, so an item must not share sums with another item: that keeps results equal
// from run to run and for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/context.h"

namespace coppice::cpu {

// fn(item, thread) for each item in [0, n), thread in [0, num_threads); items are handed out one by
// one, in order.
template <typename Fn>
void ParallelFor(Context& context, int64_t n, const Fn& fn) {
  context.pool().Run(n, fn);
}

// fn(begin, end) over ranges of `grain` items that cover [0, n).
template <typename Fn>
void ParallelRanges(Context& context, int64_t n, int64_t grain, const Fn& fn) {
  ParallelFor(context, (n + grain - 1) / grain,
              [&](int64_t i, int) { fn(i * grain, std::min(n, (i + 1) * grain)); });
}

}  // namespace coppice::cpu
