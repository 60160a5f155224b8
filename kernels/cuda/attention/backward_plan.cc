#include "kernels/cuda/attention/backward_plan.h"

namespace coppice::cuda {
namespace {

template <typename T>
int32_t Size(const std::vector<T>& v) {
  return static_cast<int32_t>(v.size());
}

struct RowRange {
  int32_t begin, end;
};

// Rows [some.begin, some.end) see the tile, rows [all.begin, all.end) all of its keys.
void AddRun(BackwardLists& lists, int32_t rows, int32_t tile, RowRange some, RowRange all) {
  constexpr int32_t kRows = kBackwardQueryTile, kHalves = kQueryTile / kRows;
  KeyRun r = {.tile = tile,
              .first = some.begin / kQueryTile * kHalves,
              .full_first = CeilDiv(all.begin, kRows),
              .full_last = all.end / kRows,
              .last = CeilDiv(some.end, kQueryTile) * kHalves,
              .image = 0,
              .row_begin = some.begin,
              .row_end = some.end};
  if (all.end >= rows) r.full_last = r.last;  // rows past the last have no weight
  r.full_first = std::min(r.full_first, r.last);
  r.full_last = std::max(r.full_last, r.full_first);
  r.image = lists.num_images - r.first;
  lists.num_images += r.last - r.first;
  lists.runs.push_back(r);
}

// [context nodes] the rows that see the node, neighbours joined, ascending.
std::vector<std::vector<RowRange>> RowsBelowNodes(const ops::TokenBatch& batch) {
  std::vector<std::vector<RowRange>> below(batch.context_nodes.size());
  for (const ops::Segment& s : batch.segments) {
    if (s.row_begin == s.row_end) continue;
    for (int32_t n = s.context_node; n >= 0; n = batch.context_nodes[n].parent) {
      if (!below[n].empty() && below[n].back().end == s.row_begin) {
        below[n].back().end = s.row_end;
      } else {
        below[n].push_back({s.row_begin, s.row_end});
      }
    }
  }
  return below;
}

void AddContext(BackwardLists& lists, const ops::TokenBatch& batch,
                const std::vector<int32_t>& first_tile) {
  const auto rows = static_cast<int32_t>(batch.num_rows());
  const std::vector<std::vector<RowRange>> below = RowsBelowNodes(batch);
  for (int32_t node = 0; node < Size(below); ++node) {
    if (below[node].empty()) continue;
    for (int32_t t = 0; t < batch.context_nodes[node].num_tokens; t += kKeyTile) {
      const bool whole = t + kKeyTile <= batch.context_nodes[node].num_tokens;
      const int32_t tile = ~(first_tile[node] + t / kKeyTile);
      lists.work.push_back({tile, Size(lists.runs), Size(below[node])});
      for (auto range = below[node].rbegin(); range != below[node].rend(); ++range)
        AddRun(lists, rows, tile, *range, whole ? *range : RowRange{range->begin, -1});
    }
  }
}

// Query tiles on multiples of kQueryTile, whatever contexts their rows have.
void AddQueryTiles(BackwardLists& lists, int32_t rows) {
  for (int32_t q0 = 0; q0 < rows; q0 += kQueryTile) {
    const int32_t q1 = std::min(q0 + kQueryTile, rows);
    const int32_t first = q0 / kBackwardQueryTile, last = CeilDiv(q1, kBackwardQueryTile);
    std::vector<int32_t> partial, full;
    for (int32_t i = 0; i < Size(lists.runs); ++i) {
      const KeyRun& r = lists.runs[i];
      if (r.first >= last || r.last <= first) continue;
      (r.full_first <= first && last <= r.full_last ? full : partial).push_back(i);
    }
    const int32_t begin = Size(lists.entries), count = Size(partial) + Size(full);
    lists.tiles.push_back({q0, q1, begin, begin + count, Size(partial), kKeyTile});
    lists.entries.insert(lists.entries.end(), partial.begin(), partial.end());
    lists.entries.insert(lists.entries.end(), full.begin(), full.end());
  }
  SortLongestFirst(lists.tiles);
}

}  // namespace

BackwardLists PlanBackward(const ops::TokenBatch& batch, const TileEnds& ends,
                           const std::vector<int32_t>& first_tile) {
  BackwardLists lists;
  const auto rows = static_cast<int32_t>(batch.num_rows());
  for (int32_t t = 0; t < Size(ends.least); ++t) {
    lists.work.push_back({t, t, 1});
    AddRun(lists, rows, t, {t * kKeyTile, ends.greatest[t]}, {(t + 1) * kKeyTile, ends.least[t]});
  }
  if (!batch.context_nodes.empty()) {
    AddContext(lists, batch, first_tile);
    AddQueryTiles(lists, rows);
  }
  const auto steps = [&](const KeyWork& work) {
    int32_t sum = 0;
    for (int32_t i = 0; i < work.num_runs; ++i)
      sum += lists.runs[work.runs_begin + i].last - lists.runs[work.runs_begin + i].first;
    return sum;
  };
  std::stable_sort(lists.work.begin(), lists.work.end(),
                   [&](const KeyWork& a, const KeyWork& b) { return steps(a) > steps(b); });
  return lists;
}

}  // namespace coppice::cuda
