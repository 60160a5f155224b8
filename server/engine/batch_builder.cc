#include "server/engine/batch_builder.h"

#include <algorithm>
#include <utility>

#include "kernels/base/check.h"

namespace coppice {
namespace {

// Runs of whole blocks, split where tables part or end.
class BlockTrie {
 public:
  struct Node {
    int parent = -1;
    std::vector<int32_t> blocks;
    std::vector<int> children;
  };

  BlockTrie() : nodes_(1) {}  // node 0: the empty root

  // After this, one node ends exactly at the end of `table`.
  void Insert(const std::vector<int32_t>& table) {
    size_t at = 0;
    int node = 0;
    while (at < table.size()) {
      const int child = FindChild(node, table[at]);
      if (child < 0) {
        AddChild(node, {table.begin() + static_cast<int64_t>(at), table.end()});
        return;
      }
      const size_t same = CommonLength(nodes_[child].blocks, table, at);
      if (same < nodes_[child].blocks.size()) Split(child, same);
      at += same;
      node = child;
    }
  }

  // The node that ends where `table` does. REQUIRES: inserted before.
  int Find(const std::vector<int32_t>& table) const {
    int node = 0;
    for (size_t at = 0; at < table.size(); at += nodes_[node].blocks.size()) {
      node = FindChild(node, table[at]);
      CHECK(node >= 0);
    }
    return node;
  }

  const Node& node(int i) const { return nodes_[i]; }
  int size() const { return static_cast<int>(nodes_.size()); }

 private:
  int FindChild(int node, int32_t block) const {
    for (int child : nodes_[node].children) {
      if (nodes_[child].blocks[0] == block) return child;
    }
    return -1;
  }

  static size_t CommonLength(const std::vector<int32_t>& run, const std::vector<int32_t>& table,
                             size_t at) {
    size_t n = 0;
    while (n < run.size() && at + n < table.size() && run[n] == table[at + n]) ++n;
    return n;
  }

  void AddChild(int node, std::vector<int32_t> blocks) {
    nodes_[node].children.push_back(size());
    nodes_.push_back({node, std::move(blocks), {}});
  }

  // The node keeps its first `keep` blocks; a new child takes the rest and the children.
  void Split(int i, size_t keep) {
    Node tail{i,
              {nodes_[i].blocks.begin() + static_cast<int64_t>(keep), nodes_[i].blocks.end()},
              std::move(nodes_[i].children)};
    const int tail_index = size();
    for (int child : tail.children) nodes_[child].parent = tail_index;
    nodes_[i].blocks.resize(keep);
    nodes_[i].children = {tail_index};
    nodes_.push_back(std::move(tail));
  }

  std::vector<Node> nodes_;
};

std::vector<int32_t> WholeContextBlocks(const SegmentSpec& spec, int64_t block_tokens) {
  std::vector<int32_t> whole;
  for (int64_t i = 0; i < spec.context_tokens / block_tokens; ++i) {
    whole.push_back(Raw(spec.blocks[i]));
  }
  return whole;
}

// Appends the trie's nodes to the batch, parents first; returns the batch's index of each trie
// node.
std::vector<int32_t> EmitContext(const BlockTrie& trie, ops::TokenBatch& batch) {
  std::vector<int32_t> index(trie.size(), -1);
  std::vector<int> stack(trie.node(0).children.rbegin(), trie.node(0).children.rend());
  while (!stack.empty()) {
    const int i = stack.back();
    stack.pop_back();
    const BlockTrie::Node& node = trie.node(i);
    index[i] = static_cast<int32_t>(batch.context_nodes.size());
    batch.context_nodes.push_back(
        {.parent = index[node.parent],
         .num_tokens = static_cast<int32_t>(node.blocks.size()) * batch.block_tokens,
         .block_begin = static_cast<int32_t>(batch.context_blocks.size())});
    batch.context_blocks.insert(batch.context_blocks.end(), node.blocks.begin(), node.blocks.end());
    stack.insert(stack.end(), node.children.rbegin(), node.children.rend());
  }
  return index;
}

// The context node of a segment: its whole blocks' node, or a leaf of its own for a partly used
// last block.
int32_t SegmentContext(const SegmentSpec& spec, int32_t whole_node, ops::TokenBatch& batch) {
  const int64_t whole = spec.context_tokens / batch.block_tokens;
  const int64_t rest = spec.context_tokens % batch.block_tokens;
  if (rest == 0) return whole_node;
  batch.context_nodes.push_back({.parent = whole_node,
                                 .num_tokens = static_cast<int32_t>(rest),
                                 .block_begin = static_cast<int32_t>(batch.context_blocks.size())});
  batch.context_blocks.push_back(Raw(spec.blocks[whole]));
  return static_cast<int32_t>(batch.context_nodes.size()) - 1;
}

void AppendRows(const SegmentSpec& spec, int32_t context_node, ops::TokenBatch& batch) {
  const int32_t begin = static_cast<int32_t>(batch.tokens.size());
  const int32_t end = begin + static_cast<int32_t>(spec.tokens.size());
  for (size_t i = 0; i < spec.tokens.size(); ++i) {
    const int64_t position = spec.context_tokens + static_cast<int64_t>(i);
    int32_t slot = -1;
    if (position >= spec.stored_tokens) {
      slot = Raw(spec.blocks[position / batch.block_tokens]) * batch.block_tokens +
             static_cast<int32_t>(position % batch.block_tokens);
    }
    batch.tokens.push_back(spec.tokens[i]);
    batch.positions.push_back(static_cast<int32_t>(position));
    batch.subtree_end.push_back(end);
    batch.kv_slots.push_back(slot);
  }
  batch.segments.push_back({.row_begin = begin, .row_end = end, .context_node = context_node});
  if (spec.wants_logits) batch.logit_rows.push_back(end - 1);
}

}  // namespace

ops::TokenBatch BuildTokenBatch(const std::vector<SegmentSpec>& specs, int64_t block_tokens) {
  ops::TokenBatch batch;
  batch.block_tokens = static_cast<int32_t>(block_tokens);
  BlockTrie trie;
  std::vector<std::vector<int32_t>> tables;
  tables.reserve(specs.size());
  for (const SegmentSpec& spec : specs) tables.push_back(WholeContextBlocks(spec, block_tokens));
  for (const std::vector<int32_t>& table : tables) trie.Insert(table);
  const std::vector<int32_t> node_index = EmitContext(trie, batch);
  for (size_t i = 0; i < specs.size(); ++i) {
    const int32_t node = SegmentContext(specs[i], node_index[trie.Find(tables[i])], batch);
    AppendRows(specs[i], node, batch);
  }
  return batch;
}

}  // namespace coppice
