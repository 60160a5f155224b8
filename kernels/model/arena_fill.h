// Fills the weight arena from a source of f32 rows on all cores. On a CPU arena of f32 the source
// writes in place; otherwise each thread stages a chunk, narrows it to the arena's dtype and
// uploads it, while the others read theirs. Large models are logged by quarters.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/model/parameters.h"
#include "kernels/ops/ops.h"

namespace coppice {

// Produces rows [row_begin, row_end) of tensors[index] as f32 (elements for a vector). Called from
// several threads at once.
using RowSource =
    std::function<absl::Status(size_t index, int64_t row_begin, int64_t row_end, float* out)>;

// INVALID_ARGUMENT naming tensor and value if a weight is larger than f16 can say.
absl::Status CheckF16Range(absl::string_view name, absl::Span<const float> values);

// Views of `tensors` lie in an arena of `ops`, f32, bf16 or f16. The first error, CheckF16Range
// among them, stops the work and is returned.
absl::Status FillTensors(const std::vector<NamedTensor>& tensors, const RowSource& source,
                         ops::Ops& ops);

}  // namespace coppice
