#include "trainer/token_tree.h"

#include <algorithm>
#include <numeric>

namespace coppice {
namespace {

bool Before(const TokenSequence& a, const TokenSequence& b) {
  const int64_t common = CommonPrefix(a, b);
  if (common == std::min(a.num_tokens(), b.num_tokens())) return a.num_tokens() < b.num_tokens();
  return a.token(common) < b.token(common);
}

// A (row, next token) pair in order of discovery, before targets are grouped by row.
struct FoundTarget {
  int32_t row;
  int32_t token;
};

class TreeBuilder {
 public:
  TreeBuilder(absl::Span<const TokenSequence> sequences, const PositionRange& range)
      : sequences_(sequences), range_(range) {
    tree_.samples.resize(sequences.size());
  }

  // Appends the rows of sequence `index` beyond the first `shared`, which the sequence before it
  // left on the path.
  void Add(int32_t index, int64_t shared) {
    const TokenSequence& sequence = sequences_[index];
    const int64_t begin = std::clamp(shared, range_.begin, range_.end);
    const int64_t end = std::min(sequence.num_rows(), range_.end);
    CloseRows(begin);
    for (int64_t p = begin; p < end; ++p) AppendRow(sequence.token(p), p);
    FindTargets(index);
  }

  TokenTree Finish() {
    CloseRows(range_.begin);
    if (tree_.num_rows() > 0) {
      tree_.batch.segments = {{.row_begin = 0, .row_end = static_cast<int32_t>(tree_.num_rows())}};
    }
    GroupTargetsByRow();
    return std::move(tree_);
  }

 private:
  void AppendRow(int32_t token, int64_t position) {
    path_.push_back(static_cast<int32_t>(tree_.num_rows()));
    tree_.batch.tokens.push_back(token);
    tree_.batch.positions.push_back(static_cast<int32_t>(position));
    tree_.batch.subtree_end.push_back(0);
    last_found_.push_back(-1);
  }

  // Ends the subtrees of the path's rows from `position` on.
  void CloseRows(int64_t position) {
    const int32_t end = static_cast<int32_t>(tree_.num_rows());
    const size_t keep = position - range_.begin;
    for (size_t p = keep; p < path_.size(); ++p) tree_.batch.subtree_end[path_[p]] = end;
    path_.resize(std::min(keep, path_.size()));
  }

  // Sorted order makes equal next tokens of a row neighbours, so comparing with the row's last
  // target is enough.
  void FindTargets(int32_t index) {
    const TokenSequence& sequence = sequences_[index];
    std::vector<TargetRef>& refs = tree_.samples[index];
    refs.resize(sequence.response.size());
    for (size_t t = 0; t < refs.size(); ++t) {
      if (!sequence.wanted.empty() && sequence.wanted[t] == 0) continue;
      const int64_t position = static_cast<int64_t>(sequence.prompt.size() + t) - 1;
      if (position < range_.begin || position >= range_.end) continue;
      const int32_t row = path_[position - range_.begin];
      const int32_t token = sequence.response[t];
      int32_t& last = last_found_[row];
      if (last < 0 || found_[last].token != token) {
        last = static_cast<int32_t>(found_.size());
        found_.push_back({row, token});
      }
      refs[t].target = last;
    }
  }

  // Turns discovery order into CSR order over the rows that have targets.
  void GroupTargetsByRow() {
    std::vector<int32_t> order(found_.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return found_[a].row < found_[b].row; });
    std::vector<TargetRef> place(found_.size());
    for (const int32_t f : order) {
      const int32_t row = found_[f].row;
      if (tree_.batch.logit_rows.empty() || tree_.batch.logit_rows.back() != row) {
        tree_.batch.logit_rows.push_back(row);
        tree_.target_indptr.push_back(static_cast<int32_t>(tree_.targets.size()));
      }
      place[f] = {.target = static_cast<int32_t>(tree_.targets.size()),
                  .head_row = static_cast<int32_t>(tree_.num_head_rows()) - 1};
      tree_.targets.push_back(found_[f].token);
    }
    tree_.target_indptr.push_back(static_cast<int32_t>(tree_.targets.size()));
    for (std::vector<TargetRef>& refs : tree_.samples) {
      for (TargetRef& ref : refs) {
        if (ref.target >= 0) ref = place[ref.target];
      }
    }
  }

  absl::Span<const TokenSequence> sequences_;
  const PositionRange range_;
  TokenTree tree_;
  std::vector<int32_t> path_;        // row of each position of the current sequence in the range
  std::vector<int32_t> last_found_;  // [rows] last entry of found_ in this row, or -1
  std::vector<FoundTarget> found_;
};

}  // namespace

std::vector<int32_t> DepthFirstOrder(absl::Span<const TokenSequence> sequences) {
  std::vector<int32_t> order(sequences.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return Before(sequences[a], sequences[b]); });
  return order;
}

int64_t SharedRows(const TokenSequence& a, const TokenSequence& b) {
  return std::min({CommonPrefix(a, b), a.num_rows(), b.num_rows()});
}

int64_t CommonPrefix(const TokenSequence& a, const TokenSequence& b) {
  int64_t common = 0;
  if (a.prompt.data() == b.prompt.data() && a.prompt.size() == b.prompt.size()) {
    common = static_cast<int64_t>(a.prompt.size());
  }
  const int64_t limit = std::min(a.num_tokens(), b.num_tokens());
  while (common < limit && a.token(common) == b.token(common)) ++common;
  return common;
}

TokenTree BuildTokenTree(absl::Span<const TokenSequence> sequences, bool share,
                         const PositionRange& range) {
  TreeBuilder builder(sequences, range);
  if (!share) {
    for (size_t i = 0; i < sequences.size(); ++i) builder.Add(static_cast<int32_t>(i), 0);
    return builder.Finish();
  }
  const TokenSequence* previous = nullptr;
  for (const int32_t i : DepthFirstOrder(sequences)) {
    builder.Add(i, previous == nullptr ? 0 : SharedRows(*previous, sequences[i]));
    previous = &sequences[i];
  }
  return builder.Finish();
}

int64_t CountTreeRows(absl::Span<const TokenSequence> sequences) {
  int64_t rows = 0;
  const TokenSequence* previous = nullptr;
  for (const int32_t i : DepthFirstOrder(sequences)) {
    rows += sequences[i].num_rows();
    if (previous != nullptr) rows -= SharedRows(*previous, sequences[i]);
    previous = &sequences[i];
  }
  return rows;
}

}  // namespace coppice
