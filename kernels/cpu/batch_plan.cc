#include "kernels/cpu/batch_plan.h"

#include <algorithm>
#include <utility>

#include "kernels/cpu/simd/kernels.h"

namespace coppice::cpu {
namespace {

int64_t MaxOf(const std::vector<int32_t>& v) {
  return v.empty() ? -1 : *std::max_element(v.begin(), v.end());
}

KeyRun ContextRun(const ops::TokenBatch& b, int32_t node) {
  const ops::ContextNode& n = b.context_nodes[node];
  return {.position = b.ContextLength(n.parent),
          .num_tokens = n.num_tokens,
          .row = -1,
          .block_begin = n.block_begin};
}

// Runs of the context chain that ends in `node`, by position.
std::vector<KeyRun> ContextPath(const ops::TokenBatch& b, int32_t node) {
  std::vector<KeyRun> path;
  for (; node >= 0; node = b.context_nodes[node].parent) path.push_back(ContextRun(b, node));
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
    node.rows.begin = row;
    node.subtree_end = b.subtree_end[row];
    node.position = b.positions[row];
    node.path = open.empty() ? context : nodes[open.back()].path;
    ++row;
    // A row whose subtree ends where its predecessor's does is its only child.
    while (row < node.subtree_end && b.subtree_end[row] == node.subtree_end) ++row;
    node.rows.end = row;
    node.path.push_back({.position = node.position,
                         .num_tokens = row - node.rows.begin,
                         .row = node.rows.begin,
                         .block_begin = -1});
    open.push_back(nodes.size());
    nodes.push_back(std::move(node));
  }
}

// Path positions that hold the same keys for both nodes.
int64_t CommonPrefix(const TreeNode& a, const TreeNode& b) {
  int64_t length = 0;
  for (size_t i = 0; i < std::min(a.path.size(), b.path.size()); ++i) {
    const KeyRun &x = a.path[i], &y = b.path[i];
    if (x.row != y.row || x.block_begin != y.block_begin || x.num_tokens != y.num_tokens) break;
    length += x.num_tokens;
  }
  return length;
}

// Adds `span` to the tile if it fits and the tile keeps at least half of its common keys.
bool JoinTile(const std::vector<TreeNode>& nodes, const RowSpan& span, int64_t position,
              QueryTile& tile) {
  const int64_t rows = span.rows.end - span.rows.begin;
  if (tile.num_rows + rows > QueryTile::kMaxRows) return false;
  const int64_t common = std::min(
      {tile.common_keys, position, CommonPrefix(nodes[tile.spans.back().node], nodes[span.node])});
  if (common < kTileKeys || 2 * common < tile.common_keys) return false;
  tile.spans.push_back(span);
  tile.num_rows += rows;
  tile.common_keys = common;
  return true;
}

std::vector<QueryTile> MakeQueryTiles(const std::vector<TreeNode>& nodes) {
  std::vector<QueryTile> tiles;
  for (size_t n = 0; n < nodes.size(); ++n) {
    const TreeNode& node = nodes[n];
    for (int64_t row = node.rows.begin; row < node.rows.end; row += QueryTile::kMaxRows) {
      const RowSpan span = {static_cast<int64_t>(n),
                            {row, std::min(node.rows.end, row + QueryTile::kMaxRows)}};
      const int64_t position = node.position + row - node.rows.begin;
      if (!tiles.empty() && JoinTile(nodes, span, position, tiles.back())) continue;
      tiles.push_back({{span}, span.rows.end - span.rows.begin, position});
    }
  }
  return tiles;
}

void AppendKeyTiles(const KeyRun& run, const std::vector<RowRange>& queries,
                    std::vector<KeyTile>& tiles) {
  for (int64_t begin = 0; begin < run.num_tokens; begin += kTileKeys) {
    tiles.push_back({run, begin, std::min(run.num_tokens, begin + kTileKeys), queries});
    // Rows before the first key of a packed tile see none of it.
    if (run.row >= 0) tiles.back().queries[0].begin = run.row + begin;
  }
}

std::vector<KeyTile> MakeKeyTiles(const ops::TokenBatch& b, const std::vector<TreeNode>& nodes) {
  std::vector<std::vector<RowRange>> readers(b.context_nodes.size());
  for (const ops::Segment& s : b.segments) {
    for (int32_t n = s.context_node; n >= 0; n = b.context_nodes[n].parent) {
      readers[n].push_back({s.row_begin, s.row_end});
    }
  }
  std::vector<KeyTile> tiles;
  for (size_t n = 0; n < readers.size(); ++n) {
    if (!readers[n].empty()) {
      AppendKeyTiles(ContextRun(b, static_cast<int32_t>(n)), readers[n], tiles);
    }
  }
  for (const TreeNode& node : nodes) {
    AppendKeyTiles(node.path.back(), {{node.rows.begin, node.subtree_end}}, tiles);
  }
  return tiles;
}

}  // namespace

CpuBatchPlan::CpuBatchPlan(const ops::TokenBatch& batch) : batch_(batch) {
  for (const ops::Segment& s : batch_.segments) AppendNodes(batch_, s, nodes_);
  query_tiles_ = MakeQueryTiles(nodes_);
  key_tiles_ = MakeKeyTiles(batch_, nodes_);
  max_position_ = MaxOf(batch_.positions);
  max_block_ = MaxOf(batch_.context_blocks);
  max_slot_ = MaxOf(batch_.kv_slots);
}

TensorView CpuBatchPlan::View(const std::vector<int32_t>& v) const {
  if (v.empty() && batch_.num_rows() > 0) return {};
  return View1D(const_cast<int32_t*>(v.data()), DType::kI32, static_cast<int64_t>(v.size()));
}

}  // namespace coppice::cpu
