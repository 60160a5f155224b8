// CpuBatchPlan: a TokenBatch with its tree made explicit: nodes of consecutive rows and, for each
// node, the runs of keys on its path in order of position. Attention walks these runs; the mask k
// <= q < subtree_end[k] then is a plain causal mask over path positions.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops/ops.h"

namespace coppice::cpu {

// `num_tokens` keys at path positions [position, position + num_tokens): packed rows from `row` on,
// or, if row < 0, tokens of the blocks context_blocks[block_begin, ...).
struct KeyRun {
  int64_t position = 0;
  int64_t num_tokens = 0;
  int64_t row = -1;
  int64_t block_begin = -1;
};

// Rows [row_begin, row_end) without branching: each sees its predecessors here and all keys of the
// ancestors.
struct TreeNode {
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int64_t subtree_end = 0;
  int64_t position = 0;      // of row_begin
  std::vector<KeyRun> path;  // context, ancestors, the node itself; by position
};

class CpuBatchPlan final : public ops::BatchPlan {
 public:
  explicit CpuBatchPlan(const ops::TokenBatch& batch);

  const ops::TokenBatch& batch() const override { return batch_; }
  TensorView tokens() const override { return View(batch_.tokens); }
  TensorView positions() const override { return View(batch_.positions); }
  TensorView kv_slots() const override { return View(batch_.kv_slots); }
  TensorView logit_rows() const override { return View(batch_.logit_rows); }

  const std::vector<TreeNode>& nodes() const { return nodes_; }
  int64_t max_position() const { return max_position_; }    // -1 without rows
  int64_t max_context_block() const { return max_block_; }  // -1 without context
  int64_t max_kv_slot() const { return max_slot_; }         // -1 without slots

 private:
  // The array, or an absent view when it is empty and the batch is not.
  TensorView View(const std::vector<int32_t>& v) const;

  ops::TokenBatch batch_;
  std::vector<TreeNode> nodes_;
  int64_t max_position_ = -1;
  int64_t max_block_ = -1;
  int64_t max_slot_ = -1;
};

}  // namespace coppice::cpu
