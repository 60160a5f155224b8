// Sums over rows, in parallel and in a fixed order: rows are cut into groups of kGrainRows, each
// group adds up in its own partial sum, and the partial sums are added in order. The result does
// not depend on the number of threads.
#pragma once

#include <algorithm>

#include "kernels/cpu/context.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"

namespace coppice::cpu {

constexpr int64_t kGrainRows = 32;

// out[0, n) += the sum over all rows. add_rows(begin, end, partial) adds rows [begin, end) to
// partial[0, n). Uses the context's scratch: ceil(rows / kGrainRows) * n floats.
template <typename AddRows>
void SumOverRows(Context& context, int64_t rows, int64_t n, float* out, const AddRows& add_rows) {
  if (rows == 0) return;
  const int64_t groups = (rows + kGrainRows - 1) / kGrainRows;
  float* partials = context.Scratch(groups * n);
  ParallelFor(context, groups, [&](int64_t group, int) {
    float* partial = partials + group * n;
    std::fill(partial, partial + n, 0.0f);
    add_rows(group * kGrainRows, std::min(rows, (group + 1) * kGrainRows), partial);
  });
  constexpr int64_t kGrainColumns = 256;
  ParallelRanges(context, n, kGrainColumns, [&](int64_t begin, int64_t end) {
    for (int64_t group = 0; group < groups; ++group) {
      SimdKernels().add(partials + group * n + begin, out + begin, end - begin);
    }
  });
}

}  // namespace coppice::cpu
