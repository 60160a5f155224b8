#include "kernels/cuda/attention/backward_plan.h"

namespace coppice::cuda {
namespace {

constexpr int32_t kHalves = kQueryTile / kBackwardQueryTile;

template <typename T>
int32_t Size(const std::vector<T>& v) {
  return static_cast<int32_t>(v.size());
}

struct RowRange {
  int32_t begin, end;
};

// Rows [some.begin, some.end) see the tile, rows [all.begin, all.end) all of its keys.
void AddRun(BackwardLists& lists, int32_t rows, int32_t tile, RowRange some, RowRange all) {
  constexpr int32_t kRows = kBackwardQueryTile;
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
      lists.work.push_back({tile, Size(lists.runs), Size(below[node]), 0});
      for (auto range = below[node].rbegin(); range != below[node].rend(); ++range)
        AddRun(lists, rows, tile, *range, whole ? *range : RowRange{range->begin, -1});
    }
  }
}

int32_t Steps(const BackwardLists& lists, const KeyWork& work) {
  int32_t sum = 0;
  for (int32_t i = work.runs_begin; i < work.runs_begin + work.num_runs; ++i)
    sum += lists.runs[i].last - lists.runs[i].first;
  return sum;
}

void SortMostRowsFirst(BackwardLists& lists, int32_t work_begin) {
  std::stable_sort(
      lists.work.begin() + work_begin, lists.work.end(),
      [&](const KeyWork& a, const KeyWork& b) { return Steps(lists, a) > Steps(lists, b); });
}

// Query tiles [first, last) of kBackwardQueryTile, on multiples of kQueryTile whatever contexts
// their rows have, over the runs from `runs_begin` on.
void AddQueryTiles(BackwardLists& lists, int32_t rows, int32_t first, int32_t last,
                   int32_t runs_begin) {
  const auto begin = static_cast<int64_t>(lists.tiles.size());
  for (int32_t tile = first; tile < last; tile += kHalves) {
    const int32_t q0 = tile * kBackwardQueryTile, q1 = std::min(q0 + kQueryTile, rows);
    const int32_t end = CeilDiv(q1, kBackwardQueryTile);
    std::vector<int32_t> partial, full;
    for (int32_t i = runs_begin; i < Size(lists.runs); ++i) {
      const KeyRun& r = lists.runs[i];
      if (r.first >= end || r.last <= tile) continue;
      (r.full_first <= tile && end <= r.full_last ? full : partial).push_back(i);
    }
    const int32_t list = Size(lists.entries), count = Size(partial) + Size(full);
    lists.tiles.push_back({q0, q1, list, list + count, Size(partial), kKeyTile});
    lists.entries.insert(lists.entries.end(), partial.begin(), partial.end());
    lists.entries.insert(lists.entries.end(), full.begin(), full.end());
  }
  std::stable_sort(lists.tiles.begin() + begin, lists.tiles.end(),
                   [](const QueryTileWork& a, const QueryTileWork& b) {
                     return a.list_end - a.list_begin > b.list_end - b.list_begin;
                   });
}

// `tiles`, or as many of them as make whole waves.
int32_t WholeWaves(int32_t tiles, const RoundLimits& limits) {
  if (limits.wave_items == 0) return tiles;
  const int32_t waves = tiles * limits.tile_items / limits.wave_items;
  return waves == 0 ? tiles : std::max(1, waves * limits.wave_items / limits.tile_items);
}

// Where rounds begin, the last rows' first, in query tiles of kBackwardQueryTile.
std::vector<int32_t> RoundBegins(const BackwardLists& whole, int32_t rows,
                                 const RoundLimits& limits) {
  std::vector<int32_t> images(CeilDiv(rows, kQueryTile), 0);
  for (const KeyRun& r : whole.runs) {
    for (int32_t t = r.first; t < r.last; ++t) ++images[t / kHalves];
  }
  std::vector<int32_t> begins;
  for (int32_t last = Size(images); last > 0; last = begins.back() / kHalves) {
    int64_t sum = images[last - 1];
    int32_t tiles = 1;
    while (tiles < last && sum + images[last - 1 - tiles] <= limits.images)
      sum += images[last - 1 - tiles++];
    begins.push_back((tiles == last ? 0 : last - WholeWaves(tiles, limits)) * kHalves);
  }
  return begins;
}

// What query tiles [first, last) have of the run; `images` counts on.
KeyRun Cut(KeyRun run, int32_t first, int32_t last, int32_t& images) {
  run.first = std::max(run.first, first);
  run.last = std::min(run.last, last);
  run.full_first = std::clamp(run.full_first, run.first, run.last);
  run.full_last = std::clamp(run.full_last, run.full_first, run.last);
  run.image = images - run.first;
  images += run.last - run.first;
  return run;
}

void AddRound(BackwardLists& lists, const BackwardLists& whole, int32_t rows, int32_t first,
              int32_t last) {
  BackwardRound round = {};
  round.tiles_begin = Size(lists.tiles);
  round.work_begin = Size(lists.work);
  const int32_t runs_begin = Size(lists.runs);
  for (const KeyWork& work : whole.work) {
    KeyWork cut = {work.tile, Size(lists.runs), 0, 0};
    for (int32_t i = work.runs_begin; i < work.runs_begin + work.num_runs; ++i) {
      const KeyRun& run = whole.runs[i];
      if (run.first >= last || run.last <= first) continue;
      if (run.last > last) cut.part |= kBegun;
      if (run.first < first) cut.part |= kGoesOn;
      lists.runs.push_back(Cut(run, first, last, round.num_images));
      ++cut.num_runs;
    }
    if (cut.num_runs > 0) lists.work.push_back(cut);
  }
  SortMostRowsFirst(lists, round.work_begin);
  const int32_t entries_begin = Size(lists.entries);
  AddQueryTiles(lists, rows, first, last, runs_begin);
  round.num_tiles = Size(lists.tiles) - round.tiles_begin;
  const QueryTileWork& longest = lists.tiles[round.tiles_begin];
  round.longest_list = longest.list_end - longest.list_begin;
  round.num_entries = Size(lists.entries) - entries_begin;
  round.num_work = Size(lists.work) - round.work_begin;
  lists.num_images = std::max(lists.num_images, round.num_images);
  lists.rounds.push_back(round);
}

BackwardLists CutIntoRounds(const BackwardLists& whole, int32_t rows, const RoundLimits& limits) {
  BackwardLists lists;
  int32_t last = CeilDiv(rows, kQueryTile) * kHalves;
  for (const int32_t first : RoundBegins(whole, rows, limits)) {
    AddRound(lists, whole, rows, first, last);
    last = first;
  }
  return lists;
}

}  // namespace

BackwardLists PlanBackward(const ops::TokenBatch& batch, const TileEnds& ends,
                           const std::vector<int32_t>& first_tile, const RoundLimits& limits) {
  BackwardLists lists;
  const auto rows = static_cast<int32_t>(batch.num_rows());
  if (rows == 0) return lists;
  for (int32_t t = 0; t < Size(ends.least); ++t) {
    lists.work.push_back({t, t, 1, 0});
    AddRun(lists, rows, t, {t * kKeyTile, ends.greatest[t]}, {(t + 1) * kKeyTile, ends.least[t]});
  }
  if (!batch.context_nodes.empty()) AddContext(lists, batch, first_tile);
  if (limits.images > 0 && lists.num_images > limits.images) {
    return CutIntoRounds(lists, rows, limits);
  }
  BackwardRound round = {};
  if (!batch.context_nodes.empty() || !limits.forward_has_tiles) {
    AddQueryTiles(lists, rows, 0, CeilDiv(rows, kQueryTile) * kHalves, 0);
    round.num_tiles = Size(lists.tiles);
    round.longest_list = lists.tiles[0].list_end - lists.tiles[0].list_begin;
    round.num_entries = Size(lists.entries);
  }
  SortMostRowsFirst(lists, 0);
  round.num_work = Size(lists.work);
  round.num_images = lists.num_images;
  lists.rounds.push_back(round);
  return lists;
}

}  // namespace coppice::cuda
