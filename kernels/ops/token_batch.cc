#include "kernels/ops/token_batch.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace coppice::ops {
namespace {

template <typename... Facts>
absl::Status Broken(const Facts&... facts) {
  return absl::InvalidArgumentError(
      absl::StrCat("token batch is malformed: ", facts..., "; fix the code that packs the batch"));
}

absl::Status CheckSizes(const TokenBatch& b) {
  const int64_t rows = b.num_rows();
  const auto check = [rows](const char* name, const std::vector<int32_t>& v) {
    if (static_cast<int64_t>(v.size()) == rows) return absl::OkStatus();
    return Broken(name, " wants ", rows, " entries, got ", v.size());
  };
  RETURN_IF_ERROR(check("positions", b.positions));
  RETURN_IF_ERROR(check("subtree_end", b.subtree_end));
  if (!b.kv_slots.empty()) RETURN_IF_ERROR(check("kv_slots", b.kv_slots));
  if ((!b.context_nodes.empty() || !b.kv_slots.empty()) && b.block_tokens <= 0) {
    return Broken("block_tokens wants a positive number, got ", b.block_tokens);
  }
  return absl::OkStatus();
}

absl::Status CheckContextNodes(const TokenBatch& b, int64_t num_blocks) {
  const int64_t available = static_cast<int64_t>(b.context_blocks.size());
  for (size_t i = 0; i < b.context_nodes.size(); ++i) {
    const ContextNode& node = b.context_nodes[i];
    if (node.parent < -1 || node.parent >= static_cast<int64_t>(i)) {
      return Broken("context node ", i, " wants a parent in [-1, ", i, "), got ", node.parent);
    }
    if (node.num_tokens <= 0) {
      return Broken("context node ", i, " wants at least one token, got ", node.num_tokens);
    }
    const int64_t needed = (int64_t{node.num_tokens} + b.block_tokens - 1) / b.block_tokens;
    if (node.block_begin < 0 || node.block_begin + needed > available) {
      return Broken("context node ", i, " wants blocks [", node.block_begin, ", ",
                    node.block_begin + needed, ") of the list, got ", available, " entries");
    }
    if (node.parent >= 0 && b.context_nodes[node.parent].num_tokens % b.block_tokens != 0) {
      return Broken("context node ", node.parent, " has a child and wants whole blocks of ",
                    b.block_tokens, " tokens, got ", b.context_nodes[node.parent].num_tokens);
    }
  }
  for (const int32_t block : b.context_blocks) {
    if (block < 0 || block >= num_blocks) {
      return Broken("context block wants an id in [0, ", num_blocks, "), got ", block);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSegments(const TokenBatch& b) {
  int64_t row = 0;
  for (size_t i = 0; i < b.segments.size(); ++i) {
    const Segment& s = b.segments[i];
    if (s.row_begin != row || s.row_end <= s.row_begin) {
      return Broken("segment ", i, " wants to begin at row ", row, " and hold rows, got [",
                    s.row_begin, ", ", s.row_end, ")");
    }
    if (s.context_node < -1 || s.context_node >= static_cast<int64_t>(b.context_nodes.size())) {
      return Broken("segment ", i, " wants a context node in [-1, ", b.context_nodes.size(),
                    "), got ", s.context_node);
    }
    row = s.row_end;
  }
  if (row != b.num_rows()) {
    return Broken("segments want to cover ", b.num_rows(), " rows, got ", row);
  }
  return absl::OkStatus();
}

// Subtrees of one segment nest and positions grow by one along every path.
absl::Status CheckTree(const TokenBatch& b, const Segment& s) {
  const int64_t context = b.ContextLength(s.context_node);
  std::vector<int32_t> ancestors;  // open rows, outermost first
  for (int32_t r = s.row_begin; r < s.row_end; ++r) {
    while (!ancestors.empty() && b.subtree_end[ancestors.back()] <= r) ancestors.pop_back();
    const int32_t limit = ancestors.empty() ? s.row_end : b.subtree_end[ancestors.back()];
    if (b.subtree_end[r] <= r || b.subtree_end[r] > limit) {
      return Broken("row ", r, " wants subtree_end in (", r, ", ", limit, "], got ",
                    b.subtree_end[r]);
    }
    const int64_t position = ancestors.empty() ? context : b.positions[ancestors.back()] + 1;
    if (b.positions[r] != position) {
      return Broken("row ", r, " wants position ", position, ", got ", b.positions[r]);
    }
    ancestors.push_back(r);
  }
  return absl::OkStatus();
}

absl::Status CheckIds(const TokenBatch& b, int64_t vocab, int64_t num_blocks) {
  for (int64_t r = 0; r < b.num_rows(); ++r) {
    if (b.tokens[r] < 0 || b.tokens[r] >= vocab) {
      return Broken("row ", r, " wants a token in [0, ", vocab, "), got ", b.tokens[r]);
    }
  }
  for (const int32_t slot : b.kv_slots) {
    if (slot < -1 || slot / b.block_tokens >= num_blocks) {
      return Broken("kv slot wants to lie in ", num_blocks, " blocks of ", b.block_tokens,
                    " tokens or be -1, got ", slot);
    }
  }
  int64_t previous = -1;
  for (const int32_t row : b.logit_rows) {
    if (row <= previous || row >= b.num_rows()) {
      return Broken("logit rows want to ascend within [0, ", b.num_rows(), "), got ", row,
                    " after ", previous);
    }
    previous = row;
  }
  return absl::OkStatus();
}

}  // namespace

int64_t TokenBatch::ContextLength(int32_t node) const {
  int64_t length = 0;
  for (; node >= 0; node = context_nodes[node].parent) length += context_nodes[node].num_tokens;
  return length;
}

absl::Status TokenBatch::Validate(int64_t vocab, int64_t num_blocks) const {
  RETURN_IF_ERROR(CheckSizes(*this));
  RETURN_IF_ERROR(CheckContextNodes(*this, num_blocks));
  RETURN_IF_ERROR(CheckSegments(*this));
  for (const Segment& s : segments) RETURN_IF_ERROR(CheckTree(*this, s));
  return CheckIds(*this, vocab, num_blocks);
}

}  // namespace coppice::ops
