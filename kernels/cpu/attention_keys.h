// Where the keys on a node's path lie in memory.
#pragma once

#include <vector>

#include "kernels/cpu/batch_plan.h"

namespace coppice::cpu {

// Pointers to the head's vector of every key (or value) on the node's path, by position.
std::vector<const float*> PathPointers(const CpuBatchPlan& plan, const TreeNode& node,
                                       const TensorView& rows, const TensorView& pages,
                                       int64_t head);

}  // namespace coppice::cpu
