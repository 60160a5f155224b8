// CpuBatchPlan: a TokenBatch with its tree made explicit, and the schedule of its attention.
//
// A node is a run of rows without branching. Its path lists, by position, the runs of keys that its
// rows see: cached context, ancestors, the node itself. On a path the mask k <= q < subtree_end[k]
// is the plain causal mask of positions, so attention only ever walks paths. Built once per batch,
// immutable, used by every layer.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops/ops.h"

namespace coppice::cpu {

// Keys at path positions [position, position + num_tokens): packed rows from `row` on, or, if row <
// 0, the tokens of the blocks context_blocks[block_begin, ...).
struct KeyRun {
  int64_t position = 0;
  int64_t num_tokens = 0;
  int64_t row = -1;
  int64_t block_begin = -1;
};

struct RowRange {
  int64_t begin = 0;
  int64_t end = 0;
};

struct TreeNode {
  RowRange rows;
  int64_t subtree_end = 0;
  int64_t position = 0;      // of the first row
  std::vector<KeyRun> path;  // by position; the last run is the node's own
};

// Consecutive rows of one node.
struct RowSpan {
  int64_t node = 0;
  RowRange rows;
};

// Up to kMaxRows rows whose attention is computed together: one span, or spans of several nodes
// that share most of their keys (samples of one prompt that decode side by side, short branches of
// a tree).
struct QueryTile {
  static constexpr int64_t kMaxRows = 32;
  std::vector<RowSpan> spans;
  int64_t num_rows = 0;
  int64_t common_keys = 0;  // path positions [0, common_keys) hold the same keys for all rows
};

// Keys that backward treats together: tokens [begin, end) of a run, at most kTileKeys, and the rows
// that see them. Packed keys are seen causally by their own node.
struct KeyTile {
  KeyRun run;
  int64_t begin = 0;
  int64_t end = 0;
  std::vector<RowRange> queries;  // ascending
};

class CpuBatchPlan final : public ops::BatchPlan {
 public:
  // REQUIRES: batch.Validate() is OK.
  explicit CpuBatchPlan(const ops::TokenBatch& batch);

  const ops::TokenBatch& batch() const override { return batch_; }
  TensorView tokens() const override { return View(batch_.tokens); }
  TensorView positions() const override { return View(batch_.positions); }
  TensorView kv_slots() const override { return View(batch_.kv_slots); }
  TensorView logit_rows() const override { return View(batch_.logit_rows); }

  const std::vector<TreeNode>& nodes() const { return nodes_; }
  const std::vector<QueryTile>& query_tiles() const { return query_tiles_; }
  const std::vector<KeyTile>& key_tiles() const { return key_tiles_; }
  int64_t max_position() const { return max_position_; }    // -1 without rows
  int64_t max_context_block() const { return max_block_; }  // -1 without context
  int64_t max_kv_slot() const { return max_slot_; }         // -1 without slots

 private:
  // The array, or an absent view when it is empty and the batch is not.
  TensorView View(const std::vector<int32_t>& v) const;

  ops::TokenBatch batch_;
  std::vector<TreeNode> nodes_;
  std::vector<QueryTile> query_tiles_;
  std::vector<KeyTile> key_tiles_;
  int64_t max_position_ = -1;
  int64_t max_block_ = -1;
  int64_t max_slot_ = -1;
};

}  // namespace coppice::cpu
