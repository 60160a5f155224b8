#include "kernels/cuda/attention/attention_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/cuda/attention/backward_plan.h"
#include "kernels/cuda/attention/decode_spread.h"

namespace coppice::cuda {
namespace {

template <typename T>
int32_t Size(const std::vector<T>& v) {
  return static_cast<int32_t>(v.size());
}

// Rows that share query tiles: one segment, or neighbours without context.
struct RowRange {
  int32_t begin, end, context_node;
};

class Planner {
 public:
  Planner(const ops::TokenBatch& batch, const AttentionPlanOptions& options)
      : batch_(batch), options_(options), num_rows_(static_cast<int32_t>(batch.num_rows())) {}

  AttentionPlan Plan() {
    MeasureContext();
    PadEnds();
    SplitSegments();
    for (const RowRange& range : tile_ranges_) AddQueryTiles(range);
    SortLongestFirst(query_tiles_);
    if (options_.backward || (options_.tiles && batch_.context_nodes.empty())) AddBackward();
    AddSharedChunks();
    for (const ops::Segment& segment : chunk_segments_) AddLongContext(segment);
    SpreadStacked();
    for (const ops::Segment& segment : chunk_segments_) AddSegmentChunks(segment);
    DealLeaves();
    SortLongestFirst(wide_);
    merges_ = PlanMerges(parts_, /*by_position=*/!MayStack());
    return Pack();
  }

 private:
  // Path lengths, and how many users (child nodes, segments) each node has.
  void MeasureContext() {
    for (const ops::ContextNode& node : batch_.context_nodes) {
      const int32_t before = node.parent < 0 ? 0 : path_tokens_[node.parent];
      path_tokens_.push_back(before + node.num_tokens);
      if (node.parent >= 0) ++num_users_[node.parent];
      num_users_.push_back(0);
    }
    for (const ops::Segment& s : batch_.segments) {
      if (s.context_node >= 0) ++num_users_[s.context_node];
    }
  }

  void PadEnds() {
    ends_ = batch_.subtree_end;
    ends_.resize(CeilDiv(num_rows_, kKeyTile) * kKeyTile, 0);
    for (size_t k = 0; k < ends_.size(); k += kKeyTile) {
      const auto [lo, hi] = std::minmax_element(ends_.begin() + k, ends_.begin() + k + kKeyTile);
      least_end_.push_back(*lo);
      greatest_end_.push_back(*hi);
    }
  }

  void SplitSegments() {
    for (const ops::Segment& s : batch_.segments) {
      if (s.row_begin == s.row_end) continue;
      const bool few = s.row_end - s.row_begin <= options_.max_decode_rows;
      if (!options_.tiles || (few && s.context_node >= 0)) {
        chunk_segments_.push_back(s);
        continue;
      }
      const bool joins = !tile_ranges_.empty() && s.context_node < 0 &&
                         tile_ranges_.back().context_node < 0 &&
                         tile_ranges_.back().end == s.row_begin;
      if (joins) {
        tile_ranges_.back().end = s.row_end;
      } else {
        tile_ranges_.push_back({s.row_begin, s.row_end, s.context_node});
      }
    }
  }

  // From the root to `node`.
  std::vector<int32_t> Chain(int32_t node) const {
    std::vector<int32_t> chain;
    for (; node >= 0; node = batch_.context_nodes[node].parent) chain.push_back(node);
    std::reverse(chain.begin(), chain.end());
    return chain;
  }

  void AddQueryTiles(const RowRange& range) {
    std::vector<int32_t> partial_context, full_context;
    int32_t tail_tokens = kKeyTile;
    for (int32_t node : Chain(range.context_node)) {
      const int32_t tokens = batch_.context_nodes[node].num_tokens;
      const int32_t first = ContextTiles(node);
      for (int32_t t = 0; t < tokens / kKeyTile; ++t) full_context.push_back(~(first + t));
      if (tokens % kKeyTile == 0) continue;
      // The path's last tile goes first: the kernel expects the one to clean up there.
      partial_context.insert(partial_context.begin(), ~(first + tokens / kKeyTile));
      tail_tokens = tokens % kKeyTile;
    }
    for (int32_t q0 = range.begin; q0 < range.end; q0 += kQueryTile) {
      const int32_t q1 = std::min(q0 + kQueryTile, range.end);
      std::vector<int32_t> partial = partial_context, full = full_context;
      for (int32_t t = range.begin / kKeyTile; t * kKeyTile < q1; ++t) {
        if (greatest_end_[t] <= q0) continue;
        const bool is_full = (t + 1) * kKeyTile - 1 <= q0 && least_end_[t] >= q1;
        (is_full ? full : partial).push_back(t);
      }
      const int32_t begin = Size(key_tiles_), count = Size(partial) + Size(full);
      query_tiles_.push_back({q0, q1, begin, begin + count, Size(partial), tail_tokens});
      key_tiles_.insert(key_tiles_.end(), partial.begin(), partial.end());
      key_tiles_.insert(key_tiles_.end(), full.begin(), full.end());
    }
  }

  // Index of the node's first context tile; its tiles are consecutive.
  int32_t ContextTiles(int32_t node) {
    first_tile_.resize(batch_.context_nodes.size(), -1);
    if (first_tile_[node] >= 0) return first_tile_[node];
    first_tile_[node] = Size(context_tiles_);
    const ops::ContextNode& n = batch_.context_nodes[node];
    const int32_t piece = std::min(batch_.block_tokens, kKeyTile);
    for (int32_t t = 0; t < n.num_tokens; t += kKeyTile) {
      const int32_t tokens = std::min(n.num_tokens - t, kKeyTile);
      context_tiles_.push_back({Size(context_slots_), ContextEnds(tokens)});
      for (int32_t i = t; i < t + kKeyTile; i += piece) {
        const bool inside = i < n.num_tokens;
        context_slots_.push_back(inside ? Slot(n, i) : -1);
      }
    }
    return first_tile_[node];
  }

  int32_t Slot(const ops::ContextNode& node, int32_t token) const {
    const int32_t block = batch_.context_blocks[node.block_begin + token / batch_.block_tokens];
    return block * batch_.block_tokens + token % batch_.block_tokens;
  }

  int32_t ContextEnds(int32_t tokens) {
    ends_of_.resize(kKeyTile + 1, -1);
    if (ends_of_[tokens] < 0) {
      ends_of_[tokens] = Size(context_ends_);
      context_ends_.insert(context_ends_.end(), tokens, std::numeric_limits<int32_t>::max());
      context_ends_.insert(context_ends_.end(), kKeyTile - tokens, 0);
    }
    return ends_of_[tokens];
  }

  void AddBackward() {
    std::vector<int32_t> first_tile(batch_.context_nodes.size());
    for (int32_t node = 0; node < Size(first_tile); ++node) first_tile[node] = ContextTiles(node);
    backward_ = PlanBackward(
        batch_, {least_end_, greatest_end_}, first_tile,
        {options_.round_images, options_.tile_items, options_.wave_items, options_.tiles});
  }

  // Whether a row's sums may follow the batch. Otherwise they follow the positions of its keys.
  bool MayStack() const {
    return options_.tiles && options_.stacked && !options_.batch_invariant &&
           options_.decode_slots > 0 && options_.group_size <= kStackedRows;
  }
  // Keys of a path that are worth a stacked item of few rows: many, or, behind what others share, a
  // tile of them: beside stacked items a leaf takes 2 us for each 16 keys (README.md, Tried).
  bool IsLong(int32_t begin, int32_t end) const {
    return end - begin >= (begin > 0 ? kKeyTile : options_.long_keys);
  }
  // What many rows share goes on the wide tensor path, and what is long.
  bool Stacks(int32_t num_rows, int32_t begin, int32_t end) const {
    return MayStack() && (!IsNarrow(num_rows) || IsLong(begin, end));
  }

  // Keys of the path that are left to the users of `node`: whole splits go with the node itself,
  // unless it has one user only.
  int32_t SharedKeys(int32_t node) const {
    if (node < 0) return 0;
    const int32_t before = SharedKeys(batch_.context_nodes[node].parent);
    if (num_users_[node] < 2) return before;
    return std::max(before, path_tokens_[node] / kSplitKeys * kSplitKeys);
  }

  bool IsDecode(const ops::Segment& s) const {
    return s.row_end - s.row_begin <= options_.max_decode_rows;
  }

  void AddSharedChunks() {
    parts_.resize(num_rows_);
    std::vector<std::vector<int32_t>> rows_below(batch_.context_nodes.size());
    for (const ops::Segment& s : chunk_segments_) {
      if (!IsDecode(s)) continue;
      for (int32_t node = s.context_node; node >= 0; node = batch_.context_nodes[node].parent) {
        for (int32_t row = s.row_begin; row < s.row_end; ++row) rows_below[node].push_back(row);
      }
    }
    for (int32_t node = 0; node < Size(rows_below); ++node) {
      const int32_t begin = SharedKeys(batch_.context_nodes[node].parent);
      if (rows_below[node].empty()) continue;
      AddChunks(rows_below[node], begin, SharedKeys(node), node, 0, /*is_shared=*/true);
    }
  }

  static std::vector<int32_t> RowsOf(const ops::Segment& s) {
    std::vector<int32_t> rows(s.row_end - s.row_begin);
    std::iota(rows.begin(), rows.end(), s.row_begin);
    return rows;
  }

  // Where the keys begin that go with the segment alone and not stacked: behind those that others
  // share, and behind the context's last whole tile where it is long.
  int32_t OwnKeys(const ops::Segment& s) const {
    const int32_t begin = SharedKeys(s.context_node);
    if (s.context_node < 0) return begin;
    const int32_t whole = path_tokens_[s.context_node] / kKeyTile * kKeyTile;
    return MayStack() && IsLong(begin, whole) ? whole : begin;
  }

  void AddLongContext(const ops::Segment& s) {
    if (!IsDecode(s)) return;
    AddChunks(RowsOf(s), SharedKeys(s.context_node), OwnKeys(s), s.context_node, 0,
              /*is_shared=*/true);
  }

  void AddSegmentChunks(const ops::Segment& s) {
    const int32_t context = s.context_node < 0 ? 0 : path_tokens_[s.context_node];
    if (IsDecode(s)) {
      const std::vector<int32_t> rows = RowsOf(s);
      AddChunks(rows, OwnKeys(s), context + Size(rows), s.context_node, s.row_begin,
                /*is_shared=*/false);
      return;
    }
    const int32_t rows = RowsPerItem(kChunkRows), blocks = AddBlocks(s.context_node, 0, context);
    for (int32_t q0 = s.row_begin; q0 < s.row_end; q0 += rows) {
      const int32_t q1 = std::min(q0 + rows, s.row_end), rows_begin = Size(chunk_rows_);
      for (int32_t row = q0; row < q1; ++row) chunk_rows_.push_back(row);
      wide_.push_back(
          {rows_begin, q1 - q0, 0, context + q1 - s.row_begin, context, blocks, s.row_begin, -1});
    }
  }

  int32_t RowsPerItem(int32_t stacked) const { return std::max(stacked / options_.group_size, 1); }

  bool IsNarrow(int32_t num_rows) const { return num_rows * options_.group_size <= kNarrowRows; }

  // The key after the item that begins at `key`. An item that begins inside a chunk is one split,
  // so that the order in which a chunk's splits are folded does not depend on where sharing ends.
  static int32_t ItemEnd(bool is_narrow, int32_t key) {
    return key + (!is_narrow && key % kChunkKeys == 0 ? kChunkKeys : kSplitKeys);
  }

  // Keys [begin, end) of the path of `node` for `rows`; `begin` is a multiple of kSplitKeys, or of
  // kKeyTile behind stacked keys. Shared: context keys only, `end` such a multiple too.
  void AddChunks(const std::vector<int32_t>& rows, int32_t begin, int32_t end, int32_t node,
                 int32_t packed_begin, bool is_shared) {
    if (begin >= end) return;
    const int32_t context = node < 0 ? 0 : path_tokens_[node];
    const int32_t first_block = AddBlocks(node, begin, std::min(end, context));
    const int32_t rows_begin = Size(chunk_rows_), num_rows = Size(rows);
    chunk_rows_.insert(chunk_rows_.end(), rows.begin(), rows.end());
    ChunkWork all = {rows_begin, num_rows, begin, end, context, first_block, packed_begin, -1};
    if (is_shared && Stacks(num_rows, begin, end)) {
      // Cut rows read all of these keys again. That a job begins with, or is, less than a split of
      // keys that others read, too, does not count.
      stacked_once_ = stacked_once_ && num_rows <= RowsPerItem(kStackedRows);
      AddItems(stacked_jobs_, RowsPerItem(kStackedRows), all);
      return;
    }
    const bool is_narrow = IsNarrow(num_rows);
    // Beside stacked items a narrow one may become a leaf, and leaves have partial results only.
    const bool may_be_leaf = is_narrow && !stacked_.empty();
    const bool whole = !is_shared && !may_be_leaf && begin == 0 && end <= ItemEnd(is_narrow, 0);
    for (int32_t key = begin; key < end;) {
      const int32_t last = std::min(ItemEnd(is_narrow, key), end);
      ChunkWork item = Piece(all, key, last);
      if (!whole) item.partial = num_partials_;
      if (is_narrow) {
        narrow_rows_ = std::max(narrow_rows_, num_rows * options_.group_size);
        narrow_.push_back(item);
      } else {
        AddItems(wide_, RowsPerItem(kChunkRows), item);
      }
      for (int32_t r = 0; r < num_rows && !whole; ++r) AddPart(rows[r], key);
      key = last;
    }
  }

  // The item's keys [begin, end) alone.
  ChunkWork Piece(ChunkWork item, int32_t begin, int32_t end) const {
    if (batch_.block_tokens > 0) {
      item.first_block += begin / batch_.block_tokens - item.key_begin / batch_.block_tokens;
    }
    item.key_begin = begin, item.key_end = end;
    return item;
  }

  void AddPart(int32_t row, int32_t key) { parts_[row].push_back({num_partials_++, key}); }

  // Cuts the item into pieces of at most `most` rows.
  static void AddItems(std::vector<ChunkWork>& items, int32_t most, ChunkWork item) {
    for (int32_t left = item.num_rows; left > 0; left -= most) {
      item.num_rows = std::min(most, left);
      items.push_back(item);
      item.rows_begin += item.num_rows;
      if (item.partial >= 0) item.partial += item.num_rows;
    }
  }

  // Deals the stacked jobs out to the slots; each slot's items come in the order of the jobs.
  void SpreadStacked() {
    if (stacked_jobs_.empty()) return;
    std::vector<DecodeJob> jobs;
    for (const ChunkWork& job : stacked_jobs_) jobs.push_back({job.key_begin, job.key_end});
    std::vector<std::vector<ChunkWork>> slots(options_.decode_slots);
    for (const DecodePiece& piece : SpreadDecode(jobs, options_.decode_slots)) {
      const ChunkWork& job = stacked_jobs_[piece.job];
      ChunkWork item = Piece(job, piece.key_begin, piece.key_end);
      item.partial = num_partials_;
      for (int32_t r = 0; r < job.num_rows; ++r) {
        AddPart(chunk_rows_[job.rows_begin + r], item.key_begin);
      }
      slots[piece.slot].push_back(item);
    }
    for (const std::vector<ChunkWork>& slot : slots) {
      if (slot.empty()) continue;
      slot_begins_.push_back(Size(stacked_));
      stacked_.insert(stacked_.end(), slot.begin(), slot.end());
    }
    slot_begins_.push_back(Size(stacked_));
  }

  // Hands the narrow items to the slots of stacked ones, if they can take them.
  void DealLeaves() {
    const int32_t slots = std::max(Size(slot_begins_) - 1, 0);
    std::vector<ChunkWork> leaves;
    if (slots > 0 && options_.group_size <= kLeafRows && FitBeside(narrow_, stacked_)) {
      for (const ChunkWork& item : narrow_) AddItems(leaves, RowsPerItem(kLeafRows), item);
      narrow_.clear();
    }
    leaves_ = DealInTurn(std::move(leaves), slots);
  }

  // Blocks of path positions [begin, end), from the block of `begin` on.
  int32_t AddBlocks(int32_t node, int32_t begin, int32_t end) {
    const int32_t first = Size(chunk_blocks_);
    if (begin >= end) return first;
    int32_t position = 0;
    for (int32_t n : Chain(node)) {
      const ops::ContextNode& c = batch_.context_nodes[n];
      for (int32_t t = 0; t < c.num_tokens;
           t += batch_.block_tokens, position += batch_.block_tokens) {
        if (position + batch_.block_tokens <= begin || position >= end) continue;
        chunk_blocks_.push_back(batch_.context_blocks[c.block_begin + t / batch_.block_tokens]);
      }
    }
    return first;
  }

  // Appends an array to the plan's words; returns its offset as a pointer, to be bound later.
  template <typename T>
  const T* Put(const std::vector<T>& v) {
    static_assert(sizeof(T) % sizeof(int32_t) == 0);
    plan_.words.resize((plan_.words.size() + 31) / 32 * 32);
    const size_t at = plan_.words.size();
    const auto* words = reinterpret_cast<const int32_t*>(v.data());
    plan_.words.insert(plan_.words.end(), words, words + v.size() * sizeof(T) / sizeof(int32_t));
    return reinterpret_cast<const T*>(at * sizeof(int32_t));
  }

  static int32_t LongestList(const std::vector<QueryTileWork>& sorted) {
    return sorted.empty() ? 0 : sorted[0].list_end - sorted[0].list_begin;
  }

  AttentionPlan Pack() {
    AttentionSchedule& s = plan_.schedule;
    s.rows = num_rows_;
    s.subtree_end = Put(ends_);
    s.query_tiles = Put(query_tiles_);
    s.key_tiles = Put(key_tiles_);
    s.context_tiles = Put(context_tiles_);
    s.context_slots = Put(context_slots_);
    s.context_ends = Put(context_ends_);
    s.num_query_tiles = Size(query_tiles_);
    s.longest_list = LongestList(query_tiles_);
    s.num_list_entries = Size(key_tiles_);
    const bool shares = backward_.tiles.empty();  // forward's lists are the same
    s.backward_tiles = shares ? s.query_tiles : Put(backward_.tiles);
    s.backward_entries = shares ? s.key_tiles : Put(backward_.entries);
    s.num_backward_tiles = shares ? s.num_query_tiles : Size(backward_.tiles);
    s.longest_backward_list = shares ? s.longest_list : LongestList(backward_.tiles);
    s.num_backward_entries = shares ? s.num_list_entries : Size(backward_.entries);
    s.key_work = Put(backward_.work);
    s.key_runs = Put(backward_.runs);
    s.num_key_work = Size(backward_.work);
    s.num_images = backward_.num_images;
    plan_.rounds = std::move(backward_.rounds);
    if (shares && !plan_.rounds.empty()) {
      plan_.rounds[0].num_tiles = s.num_query_tiles;
      plan_.rounds[0].longest_list = s.longest_list;
      plan_.rounds[0].num_entries = s.num_list_entries;
    }
    s.num_rounds = Size(plan_.rounds);
    s.num_context_tiles = Size(context_tiles_);
    s.num_context_ends = Size(context_ends_);
    s.wide_chunks = Put(wide_);
    s.narrow_chunks = Put(narrow_);
    s.stacked_chunks = Put(stacked_);
    s.stacked_slots = Put(slot_begins_);
    s.leaf_chunks = Put(leaves_.items);
    s.leaf_slots = Put(leaves_.begins);
    s.num_arrivals = options_.kv_heads;
    s.arrivals = const_cast<int32_t*>(
        Put(std::vector<int32_t>(size_t(options_.kv_heads) * kArrivalWords, 0)));
    s.chunk_rows = Put(chunk_rows_);
    s.chunk_blocks = Put(chunk_blocks_);
    s.merges = Put(merges_.rows);
    s.merge_chunks = Put(merges_.chunks);
    s.merge_parts = Put(merges_.parts);
    s.num_wide = Size(wide_);
    s.num_narrow = Size(narrow_);
    s.stacked_once = stacked_once_;
    s.num_stacked_slots = std::max(Size(slot_begins_) - 1, 0);
    s.num_merges = Size(merges_.rows);
    s.num_partials = num_partials_;
    s.narrow_rows = narrow_rows_;
    s.most_chunks = merges_.most_chunks;
    plan_.has_context = !batch_.context_nodes.empty();
    return std::move(plan_);
  }

  const ops::TokenBatch& batch_;
  const AttentionPlanOptions options_;
  const int32_t num_rows_;
  AttentionPlan plan_;

  std::vector<int32_t> path_tokens_, num_users_;   // [context nodes]
  std::vector<int32_t> ends_;                      // [padded rows]
  std::vector<int32_t> least_end_, greatest_end_;  // [key tiles]
  std::vector<RowRange> tile_ranges_;
  std::vector<ops::Segment> chunk_segments_;

  std::vector<QueryTileWork> query_tiles_;
  std::vector<int32_t> key_tiles_, context_slots_, context_ends_, first_tile_, ends_of_;
  std::vector<ContextTile> context_tiles_;
  BackwardLists backward_;

  std::vector<ChunkWork> wide_, narrow_, stacked_jobs_, stacked_;
  bool stacked_once_ = true;
  DealtItems leaves_;
  std::vector<int32_t> slot_begins_;
  std::vector<int32_t> chunk_rows_, chunk_blocks_;
  std::vector<std::vector<PartialResult>> parts_;  // [rows]
  MergeLists merges_;
  int32_t num_partials_ = 0, narrow_rows_ = 0;
};

template <typename T>
void Rebase(const T*& pointer, const int32_t* words) {
  const auto offset_bytes = reinterpret_cast<uintptr_t>(pointer);
  pointer = reinterpret_cast<const T*>(reinterpret_cast<uintptr_t>(words) + offset_bytes);
}

}  // namespace

AttentionSchedule AttentionPlan::Bind(const int32_t* device_words) const {
  AttentionSchedule s = schedule;
  Rebase(s.subtree_end, device_words);
  Rebase(s.query_tiles, device_words);
  Rebase(s.key_tiles, device_words);
  Rebase(s.context_tiles, device_words);
  Rebase(s.context_slots, device_words);
  Rebase(s.context_ends, device_words);
  Rebase(s.backward_tiles, device_words);
  Rebase(s.backward_entries, device_words);
  Rebase(s.key_work, device_words);
  Rebase(s.key_runs, device_words);
  Rebase(s.wide_chunks, device_words);
  Rebase(s.narrow_chunks, device_words);
  Rebase(s.stacked_chunks, device_words);
  Rebase(s.stacked_slots, device_words);
  Rebase(s.leaf_chunks, device_words);
  Rebase(s.leaf_slots, device_words);
  Rebase(const_cast<const int32_t*&>(s.arrivals), device_words);
  Rebase(s.chunk_rows, device_words);
  Rebase(s.chunk_blocks, device_words);
  Rebase(s.merges, device_words);
  Rebase(s.merge_chunks, device_words);
  Rebase(s.merge_parts, device_words);
  return s;
}

AttentionPlan PlanAttention(const ops::TokenBatch& batch, const AttentionPlanOptions& options) {
  return Planner(batch, options).Plan();
}

}  // namespace coppice::cuda
