#include "kernels/cpu/batch_plan.h"

#include <algorithm>

namespace coppice::cpu {
namespace {

int64_t MaxOf(const std::vector<int32_t>& v) {
  return v.empty() ? -1 : *std::max_element(v.begin(), v.end());
}

// Runs of the context chain that ends in `node`, by position.
std::vector<KeyRun> ContextPath(const ops::TokenBatch& b, int32_t node) {
  std::vector<KeyRun> path;
  for (; node >= 0; node = b.context_nodes[node].parent) {
    const ops::ContextNode& n = b.context_nodes[node];
    path.push_back({.position = b.ContextLength(n.parent),
                    .num_tokens = n.num_tokens,
                    .row = -1,
                    .block_begin = n.block_begin});
  }
  std::reverse(path.begin(), path.end());
  return path;
}

// Appends the nodes of one segment in depth-first order.
void AppendNodes(const ops::TokenBatch& b, const ops::Segment& s, std::vector<TreeNode>& nodes) {
  const std::vector<KeyRun> context = ContextPath(b, s.context_node);
  std::vector<size_t> open;  // nodes whose subtree holds the current row, outermost first
  int64_t row = s.row_begin;
  while (row < s.row_end) {
    while (!open.empty() && nodes[open.back()].subtree_end <= row) open.pop_back();
    TreeNode node;
    node.row_begin = row;
    node.subtree_end = b.subtree_end[row];
    node.position = b.positions[row];
    node.path = open.empty() ? context : nodes[open.back()].path;
    ++row;
    // A row continues the node if the subtree is its predecessor's: then it is the only child.
    while (row < node.subtree_end && b.subtree_end[row] == node.subtree_end) ++row;
    node.row_end = row;
    node.path.push_back({.position = node.position,
                         .num_tokens = node.row_end - node.row_begin,
                         .row = node.row_begin,
                         .block_begin = -1});
    open.push_back(nodes.size());
    nodes.push_back(std::move(node));
  }
}

}  // namespace

CpuBatchPlan::CpuBatchPlan(const ops::TokenBatch& batch) : batch_(batch) {
  for (const ops::Segment& s : batch_.segments) AppendNodes(batch_, s, nodes_);
  max_position_ = MaxOf(batch_.positions);
  max_block_ = MaxOf(batch_.context_blocks);
  max_slot_ = MaxOf(batch_.kv_slots);
}

TensorView CpuBatchPlan::View(const std::vector<int32_t>& v) const {
  if (v.empty() && batch_.num_rows() > 0) return {};
  return View1D(const_cast<int32_t*>(v.data()), DType::kI32, static_cast<int64_t>(v.size()));
}

}  // namespace coppice::cpu
