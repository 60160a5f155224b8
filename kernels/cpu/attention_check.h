// Shape checks that attention's forward and backward share.
#pragma once

#include "absl/status/status.h"
#include "kernels/cpu/batch_plan.h"
#include "kernels/ops/params.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {

// Checks q, k, v and, when the plan has context nodes, its pages.
absl::Status CheckAttentionInputs(absl::string_view op, const ops::BatchPlan* plan,
                                  const TensorView& q, const TensorView& k, const TensorView& v,
                                  const ops::PagedKv& context, float scale);

}  // namespace coppice::cpu
