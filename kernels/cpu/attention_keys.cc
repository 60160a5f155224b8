#include "kernels/cpu/attention_keys.h"

namespace coppice::cpu {

std::vector<const float*> PathPointers(const CpuBatchPlan& plan, const TreeNode& node,
                                       const TensorView& rows, const TensorView& pages,
                                       int64_t head) {
  const int64_t block_tokens = plan.batch().block_tokens;
  std::vector<const float*> pointers;
  for (const KeyRun& run : node.path) {
    for (int64_t i = 0; i < run.num_tokens; ++i) {
      if (run.row >= 0) {
        pointers.push_back(rows.f32() + (run.row + i) * rows.stride[0] + head * rows.stride[1]);
      } else {
        const int64_t block = plan.batch().context_blocks[run.block_begin + i / block_tokens];
        pointers.push_back(pages.f32() + block * pages.stride[0] +
                           i % block_tokens * pages.stride[1] + head * pages.stride[2]);
      }
    }
  }
  return pointers;
}

}  // namespace coppice::cpu
