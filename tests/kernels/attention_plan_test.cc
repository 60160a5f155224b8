// The attention plan against the definition of the mask: whichever kernels share the work, every
// row meets every key it sees exactly once, and no other.
#include "kernels/cuda/attention/attention_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

namespace coppice::cuda {
namespace {

// A key: a slot of the pages, or packed row -1 - key.
using Visits = std::vector<std::vector<int64_t>>;  // [rows] keys

int64_t Packed(int32_t row) { return -1 - int64_t{row}; }

struct BatchBuilder {
  ops::TokenBatch batch;

  explicit BatchBuilder(int32_t block_tokens) { batch.block_tokens = block_tokens; }
  int32_t Node(int32_t parent, int32_t tokens) {
    const auto begin = static_cast<int32_t>(batch.context_blocks.size());
    batch.context_nodes.push_back({parent, tokens, begin});
    for (int32_t t = 0; t < tokens; t += batch.block_tokens) {
      batch.context_blocks.push_back(static_cast<int32_t>(batch.context_blocks.size() * 37 % 8191));
    }
    return static_cast<int32_t>(batch.context_nodes.size()) - 1;
  }
  void Segment(int32_t node, std::vector<int32_t> ends) {
    const auto begin = static_cast<int32_t>(batch.subtree_end.size());
    for (int32_t& end : ends) end += begin;
    batch.subtree_end.insert(batch.subtree_end.end(), ends.begin(), ends.end());
    batch.segments.push_back({begin, static_cast<int32_t>(batch.subtree_end.size()), node});
    batch.tokens.resize(batch.subtree_end.size());
    batch.positions.resize(batch.subtree_end.size());
    const auto context = static_cast<int32_t>(batch.ContextLength(node));
    std::vector<int32_t> open;  // rows whose subtree is not over
    for (int32_t row = begin; row < batch.segments.back().row_end; ++row) {
      while (!open.empty() && batch.subtree_end[open.back()] <= row) open.pop_back();
      batch.positions[row] = context + static_cast<int32_t>(open.size());
      open.push_back(row);
    }
  }
};

void Grow(std::vector<int32_t>& end, std::mt19937& random, int depth, int longest) {
  const size_t first = end.size(), own = 1 + random() % longest;
  end.resize(first + own);
  if (depth > 1) {
    for (int n = static_cast<int>(random() % 3); n > 0; --n) Grow(end, random, depth - 1, longest);
  }
  std::fill_n(end.begin() + first, own, static_cast<int32_t>(end.size()));
}

ops::TokenBatch RandomBatch(uint32_t seed) {
  std::mt19937 random(seed);
  const int32_t block_tokens = 8 << random() % 6;
  BatchBuilder b(block_tokens);
  std::vector<int32_t> inner;  // nodes of whole blocks
  for (int segments = 1 + static_cast<int>(random() % 12); segments > 0; --segments) {
    int32_t node = inner.empty() || random() % 3 == 0 ? -1 : inner[random() % inner.size()];
    if (random() % 3 != 0) {
      node =
          b.Node(node, block_tokens * static_cast<int32_t>(1 + random() % (3000 / block_tokens)));
      inner.push_back(node);
    }
    if (random() % 2 == 0) node = b.Node(node, static_cast<int32_t>(1 + random() % 400));
    std::vector<int32_t> ends;
    Grow(ends, random, 1 + static_cast<int>(random() % 3), random() % 2 == 0 ? 3 : 200);
    b.Segment(node, ends);
  }
  return b.batch;
}

Visits WantVisits(const ops::TokenBatch& batch) {
  Visits want(batch.subtree_end.size());
  for (const ops::Segment& s : batch.segments) {
    for (int32_t row = s.row_begin; row < s.row_end; ++row) {
      for (int32_t n = s.context_node; n >= 0; n = batch.context_nodes[n].parent) {
        const ops::ContextNode& node = batch.context_nodes[n];
        for (int32_t t = 0; t < node.num_tokens; ++t) {
          const int64_t block = batch.context_blocks[node.block_begin + t / batch.block_tokens];
          want[row].push_back(block * batch.block_tokens + t % batch.block_tokens);
        }
      }
      for (int32_t k = s.row_begin; k <= row; ++k) {
        if (row < batch.subtree_end[k]) want[row].push_back(Packed(k));
      }
    }
  }
  return want;
}

void VisitTile(const AttentionSchedule& s, const ops::TokenBatch& batch, const QueryTileWork& tile,
               int32_t entry, bool masked, Visits& visits) {
  const int32_t piece = std::min(batch.block_tokens, kKeyTile);
  bool all_full = true, all_stored = true;
  for (int32_t i = 0; i < kKeyTile; ++i) {
    for (int32_t row = tile.row_begin; row < tile.row_end; ++row) {
      if (entry >= 0) {
        const int32_t k = entry * kKeyTile + i;
        const bool sees = k <= row && row < s.subtree_end[k];
        all_full &= sees;
        if (sees) visits[row].push_back(Packed(k));
        continue;
      }
      const ContextTile& context = s.context_tiles[~entry];
      const bool sees =
          s.context_ends[context.first_end + i] == std::numeric_limits<int32_t>::max();
      const int32_t slot = s.context_slots[context.first_piece + i / piece];
      all_full &= sees, all_stored &= slot >= 0 || !sees;
      if (sees) visits[row].push_back(int64_t{slot} + i % piece);
    }
  }
  EXPECT_TRUE(all_full || masked) << "rows from " << tile.row_begin << " entry " << entry;
  EXPECT_TRUE(all_stored);
}

void VisitTiles(const AttentionSchedule& s, const ops::TokenBatch& batch, Visits& visits) {
  for (int32_t t = 0; t < s.num_query_tiles; ++t) {
    const QueryTileWork& tile = s.query_tiles[t];
    ASSERT_LE(tile.row_end - tile.row_begin, kQueryTile);
    ASSERT_LT(tile.list_begin, tile.list_end);
    ASSERT_LE(tile.list_end - tile.list_begin, s.longest_list);
    for (int32_t i = tile.list_begin; i < tile.list_end; ++i) {
      VisitTile(s, batch, tile, s.key_tiles[i], i - tile.list_begin < tile.partial, visits);
    }
    if (tile.tail_tokens == kKeyTile) continue;
    ASSERT_LT(s.key_tiles[tile.list_begin], 0);
    const int32_t* ends = s.context_ends + s.context_tiles[~s.key_tiles[tile.list_begin]].first_end;
    EXPECT_GT(ends[tile.tail_tokens - 1], 0);
    EXPECT_EQ(ends[tile.tail_tokens], 0);
  }
}

struct Part {
  int32_t row, key_begin;
};

void VisitChunks(const AttentionSchedule& s, const ops::TokenBatch& batch, const ChunkWork* items,
                 int32_t count, Visits& visits, std::map<int32_t, Part>& parts) {
  for (const ChunkWork* item = items; item < items + count; ++item) {
    EXPECT_EQ(item->key_begin % (s.num_stacked_slots > 0 ? kKeyTile : kSplitKeys), 0);
    EXPECT_TRUE(items != s.stacked_chunks || item->key_end % kKeyTile == 0);
    EXPECT_TRUE(items != s.leaf_chunks || item->key_end - item->key_begin <= kSplitKeys);
    for (int32_t r = 0; r < item->num_rows; ++r) {
      const int32_t row = s.chunk_rows[item->rows_begin + r];
      if (item->partial >= 0) {
        EXPECT_TRUE(parts.insert({item->partial + r, {row, item->key_begin}}).second);
      }
      for (int32_t j = item->key_begin; j < item->key_end; ++j) {
        if (j < item->context_tokens) {
          const int32_t at = j / batch.block_tokens - item->key_begin / batch.block_tokens;
          const int64_t block = s.chunk_blocks[item->first_block + at];
          visits[row].push_back(block * batch.block_tokens + j % batch.block_tokens);
          continue;
        }
        const int32_t k = item->packed_begin + j - item->context_tokens;
        if (k <= row && row < s.subtree_end[k]) visits[row].push_back(Packed(k));
      }
    }
  }
}

// Every partial result is merged once, into its own row, in the order of its keys.
void CheckMerges(const AttentionSchedule& s, const std::map<int32_t, Part>& parts,
                 bool by_position) {
  std::set<int32_t> merged;
  for (int32_t m = 0; m < s.num_merges; ++m) {
    int32_t last_key = -1;
    EXPECT_LE(s.merges[m].num_chunks, s.most_chunks);
    EXPECT_EQ(s.merges[m].parts_begin, s.merge_chunks[s.merges[m].chunks_begin]);
    EXPECT_EQ(s.merges[m].parts_end,
              s.merge_chunks[s.merges[m].chunks_begin + s.merges[m].num_chunks]);
    for (int32_t c = 0; c < s.merges[m].num_chunks; ++c) {
      const int32_t* ends = s.merge_chunks + s.merges[m].chunks_begin + c;
      EXPECT_LE(ends[1] - ends[0], kChunkParts);
      for (int32_t i = ends[0]; i < ends[1]; ++i) {
        const auto part = parts.find(s.merge_parts[i]);
        ASSERT_NE(part, parts.end());
        EXPECT_TRUE(merged.insert(part->first).second);
        EXPECT_EQ(part->second.row, s.merges[m].row);
        EXPECT_GT(part->second.key_begin, last_key);
        EXPECT_TRUE(!by_position || (i == ends[0]) == (part->second.key_begin % kChunkKeys == 0));
        last_key = part->second.key_begin;
      }
    }
  }
  EXPECT_EQ(merged.size(), parts.size());
  EXPECT_EQ(static_cast<int32_t>(parts.size()), s.num_partials);
}

void CheckPlan(const ops::TokenBatch& batch, const AttentionPlanOptions& options) {
  const AttentionPlan plan = PlanAttention(batch, options);
  const AttentionSchedule s = plan.Bind(plan.words.data());
  Visits visits(batch.subtree_end.size());
  VisitTiles(s, batch, visits);
  std::map<int32_t, Part> parts;
  VisitChunks(s, batch, s.wide_chunks, s.num_wide, visits, parts);
  VisitChunks(s, batch, s.narrow_chunks, s.num_narrow, visits, parts);
  const int32_t num_stacked = s.num_stacked_slots > 0 ? s.stacked_slots[s.num_stacked_slots] : 0;
  VisitChunks(s, batch, s.stacked_chunks, num_stacked, visits, parts);
  VisitChunks(s, batch, s.leaf_chunks, s.leaf_slots[s.num_stacked_slots], visits, parts);
  const bool stacks = options.tiles && options.stacked && !options.batch_invariant;
  CheckMerges(s, parts, /*by_position=*/!stacks);
  Visits want = WantVisits(batch);
  for (auto& row : visits) std::sort(row.begin(), row.end());
  for (auto& row : want) std::sort(row.begin(), row.end());
  EXPECT_TRUE(visits == want);
}

TEST(AttentionPlanTest, EveryRowMeetsEveryVisibleKeyOnce) {
  for (uint32_t seed = 1; seed <= 5; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    const ops::TokenBatch batch = RandomBatch(seed);
    for (bool tiles : {true, false}) {
      for (bool batch_invariant : {true, false}) {
        for (int32_t group_size : {1, 3, 32}) {
          CheckPlan(batch, {.tiles = tiles,
                            .group_size = group_size,
                            .batch_invariant = batch_invariant,
                            .max_decode_rows = 8});
        }
      }
    }
    if (HasFailure()) return;
  }
}

struct SlotLoads {
  int64_t least = std::numeric_limits<int64_t>::max(), most = 0;  // key tiles of a slot
  int64_t shared_keys = 0;
};

SlotLoads LoadsOf(const AttentionSchedule& s, int32_t samples) {
  SlotLoads loads;
  for (int32_t slot = 0; slot < s.num_stacked_slots; ++slot) {
    int64_t tiles = 0;
    for (int32_t i = s.stacked_slots[slot]; i < s.stacked_slots[slot + 1]; ++i) {
      const ChunkWork& item = s.stacked_chunks[i];
      tiles += (item.key_end - item.key_begin + kKeyTile - 1) / kKeyTile;
      if (item.num_rows == samples) loads.shared_keys += item.key_end - item.key_begin;
    }
    loads.least = std::min(loads.least, tiles);
    loads.most = std::max(loads.most, tiles);
  }
  return loads;
}

TEST(AttentionPlanTest, SharedContextIsReadOnceForAllSamplesByEvenSlots) {
  for (const int32_t samples : {9, 16, 32}) {
    BatchBuilder b(64);
    const int32_t prompt = b.Node(-1, 4096);
    for (int i = 0; i < samples; ++i) b.Segment(b.Node(prompt, 10), {1});
    const AttentionPlan plan = PlanAttention(b.batch, {.group_size = 4, .decode_slots = 5});
    const AttentionSchedule s = plan.Bind(plan.words.data());
    const SlotLoads loads = LoadsOf(s, samples);
    EXPECT_EQ(loads.shared_keys, 4096);
    EXPECT_EQ(s.num_stacked_slots, 5);
    EXPECT_LE(loads.most - loads.least, 3) << samples;  // short jobs cost less than a tile
  }
}

TEST(AttentionPlanTest, StackedItemsReadAKeyOnceUntilRowsOfAPromptAreCut) {
  for (const auto& [samples, once] : {std::pair{9, true}, {32, true}, {33, false}}) {
    BatchBuilder b(64);
    for (int group = 0; group < 3; ++group) {
      const int32_t prompt = b.Node(-1, 4096);
      for (int i = 0; i < (group == 1 ? samples : 9); ++i) b.Segment(b.Node(prompt, 10), {1});
    }
    const AttentionPlan plan = PlanAttention(b.batch, {.group_size = 4, .decode_slots = 5});
    EXPECT_EQ(plan.schedule.stacked_once, once) << samples;
  }
}

// What a sample has for itself begins with the last split of the prompt, which is not whole.
TEST(AttentionPlanTest, StackedItemsReadLessThanASplitOfAPromptAgain) {
  BatchBuilder b(16);
  const int32_t prompt = b.Node(-1, 992);
  for (int i = 0; i < 8; ++i) b.Segment(b.Node(prompt, 400), {1});
  const AttentionPlan plan = PlanAttention(b.batch, {.group_size = 4, .decode_slots = 16});
  const AttentionSchedule s = plan.Bind(plan.words.data());
  EXPECT_TRUE(s.stacked_once);
  int64_t shared = 0, again = 0;
  for (int32_t i = 0; i < s.stacked_slots[s.num_stacked_slots]; ++i) {
    const ChunkWork& item = s.stacked_chunks[i];
    const int32_t keys = std::min(item.key_end, 992) - std::min(item.key_begin, 992);
    (item.num_rows == 8 ? shared : again) += keys;
  }
  EXPECT_EQ(shared, 992 / kSplitKeys * kSplitKeys);
  EXPECT_EQ(again, 8 * (992 % kSplitKeys));
}

TEST(AttentionPlanTest, ALongContextOfFewRowsIsSpreadOverAllSlots) {
  BatchBuilder b(16);
  b.Segment(b.Node(-1, 4000), {1});
  const AttentionPlanOptions options = {.group_size = 4, .decode_slots = 16};
  CheckPlan(b.batch, options);
  const AttentionPlan plan = PlanAttention(b.batch, options);
  const AttentionSchedule s = plan.Bind(plan.words.data());
  const SlotLoads loads = LoadsOf(s, 1);
  EXPECT_EQ(s.num_stacked_slots, 16);
  EXPECT_EQ(loads.shared_keys, 4000 / kKeyTile * kKeyTile);
  EXPECT_EQ(loads.most, 2);
  EXPECT_EQ(s.num_narrow, 0);
  EXPECT_EQ(s.leaf_slots[16], 1);
}

TEST(AttentionPlanTest, PartsComeByKeyWhereFewRowsShareTheLongestNode) {
  BatchBuilder b(16);
  const int32_t prompt = b.Node(-1, 512), turn = b.Node(prompt, 4096);
  for (int i = 0; i < 4; ++i) b.Segment(b.Node(turn, 5 + i), {1});
  for (int i = 0; i < 3; ++i) b.Segment(b.Node(prompt, 5 + i), {1});
  const AttentionPlanOptions options = {.group_size = 4};
  CheckPlan(b.batch, options);
  const AttentionPlan plan = PlanAttention(b.batch, options);
  EXPECT_EQ(LoadsOf(plan.Bind(plan.words.data()), 4).shared_keys, 4096);
}

// Leaves of `own` tokens beside a prompt: how many the slots take, at most and at least.
std::pair<int32_t, int32_t> LeavesOfSlots(int32_t own, int32_t slots) {
  BatchBuilder b(64);
  const int32_t prompt = b.Node(-1, 4096);
  for (int i = 0; i < 40; ++i) b.Segment(b.Node(prompt, own), {1});
  const AttentionPlanOptions options = {.group_size = 4, .decode_slots = slots};
  CheckPlan(b.batch, options);
  const AttentionPlan plan = PlanAttention(b.batch, options);
  const AttentionSchedule s = plan.Bind(plan.words.data());
  EXPECT_EQ(s.leaf_slots[slots] + s.num_narrow, 40 * ((own + kSplitKeys) / kSplitKeys));
  std::pair<int32_t, int32_t> counts = {0, std::numeric_limits<int32_t>::max()};
  for (int32_t slot = 0; slot < slots; ++slot) {
    const int32_t count = s.leaf_slots[slot + 1] - s.leaf_slots[slot];
    counts = {std::max(counts.first, count), std::min(counts.second, count)};
  }
  return counts;
}

TEST(AttentionPlanTest, LeavesGoToAllSlotsWhileTheyFitBesideThePrompt) {
  EXPECT_EQ(LeavesOfSlots(30, 16), std::pair(3, 2));
  EXPECT_EQ(LeavesOfSlots(120, 16), std::pair(0, 0));
}

TEST(AttentionPlanTest, WholeTilesOfASamplesOwnAreStackedBehindAPrompt) {
  struct Case {
    int32_t prompt, own, tiles;
  };
  // What is behind a prompt's last whole split counts as a sample's own.
  for (const auto& [prompt_tokens, own, tiles] :
       {Case{4096, 127, 0}, Case{4096, 128, 1}, Case{4096, 200, 1}, Case{4096, 300, 2},
        Case{4096 + 128, 1, 1}, Case{4096 + 248, 9, 2}, Case{256, 130, 1}, Case{248, 130, 0}}) {
    SCOPED_TRACE(testing::Message() << prompt_tokens << " + " << own);
    BatchBuilder b(8);
    const int32_t prompt = b.Node(-1, prompt_tokens);
    for (int i = 0; i < 8; ++i) b.Segment(b.Node(prompt, own), {1});
    AttentionPlanOptions options = {.group_size = 4, .decode_slots = 16};
    CheckPlan(b.batch, options);
    const AttentionPlan plan = PlanAttention(b.batch, options);
    EXPECT_EQ(LoadsOf(plan.Bind(plan.words.data()), 1).shared_keys, 8 * tiles * kKeyTile);
    EXPECT_TRUE(plan.schedule.stacked_once);
    options.batch_invariant = true;
    EXPECT_EQ(PlanAttention(b.batch, options).schedule.num_stacked_slots, 0);
  }
}

// Two requests that share nothing, one of them short: its items may run beside the other's.
TEST(AttentionPlanTest, ALeafHasPartialResultsEvenIfItHoldsAllKeysOfItsRows) {
  BatchBuilder b(64);
  const int32_t prompt = b.Node(-1, 4096);
  for (int i = 0; i < 4; ++i) b.Segment(b.Node(prompt, 5 + i), {1});
  b.Segment(b.Node(-1, 100), {1});
  b.Segment(b.Node(-1, 70), {3, 2, 3});
  const AttentionPlanOptions options = {.group_size = 4};
  CheckPlan(b.batch, options);
  const AttentionPlan plan = PlanAttention(b.batch, options);
  const AttentionSchedule s = plan.Bind(plan.words.data());
  const int32_t leaves = s.leaf_slots[s.num_stacked_slots];
  ASSERT_GT(leaves, 0);
  for (int32_t i = 0; i < leaves; ++i) EXPECT_GE(s.leaf_chunks[i].partial, 0) << i;
}

TEST(AttentionPlanTest, AShortContextIsNotMerged) {
  BatchBuilder b(16);
  b.Segment(b.Node(-1, 200), {3, 2, 3});
  const AttentionPlan plan = PlanAttention(b.batch, {.group_size = 4});
  EXPECT_EQ(plan.schedule.num_stacked_slots, 0);
  EXPECT_EQ(plan.schedule.num_narrow, 1);
  EXPECT_EQ(plan.schedule.num_partials, 0);
  EXPECT_EQ(plan.schedule.num_merges, 0);
}

bool Sees(const AttentionSchedule& s, const KeyRun& run, int32_t i, int32_t row) {
  if (run.tile >= 0) {
    const int32_t key = run.tile * kKeyTile + i;
    return key <= row && row < s.subtree_end[key];
  }
  const int32_t* ends = s.context_ends + s.context_tiles[~run.tile].first_end;
  return run.row_begin <= row && row < run.row_end && ends[i] > 0;
}

int64_t KeyOf(const AttentionSchedule& s, const ops::TokenBatch& batch, int32_t tile, int32_t i) {
  if (tile >= 0) return Packed(tile * kKeyTile + i);
  const int32_t piece = std::min(batch.block_tokens, kKeyTile);
  return s.context_slots[s.context_tiles[~tile].first_piece + i / piece] + i % piece;
}

// What the dK/dV kernel does: key tiles, their runs, query tiles of 64 rows.
Visits VisitByKeys(const AttentionSchedule& s, const ops::TokenBatch& batch) {
  Visits visits(batch.subtree_end.size());
  for (int32_t w = 0; w < s.num_key_work; ++w) {
    const KeyWork& work = s.key_work[w];
    for (int32_t r = work.runs_begin; r < work.runs_begin + work.num_runs; ++r) {
      const KeyRun& run = s.key_runs[r];
      EXPECT_EQ(run.tile, work.tile);
      const int32_t end = std::min(run.last * kBackwardQueryTile, s.rows);
      for (int32_t row = run.first * kBackwardQueryTile; row < end; ++row) {
        const int32_t tile = row / kBackwardQueryTile;
        for (int32_t i = 0; i < kKeyTile; ++i) {
          const bool sees = Sees(s, run, i, row);
          EXPECT_TRUE(sees || tile < run.full_first || tile >= run.full_last);
          if (sees) visits[row].push_back(KeyOf(s, batch, work.tile, i));
        }
      }
    }
  }
  return visits;
}

// What the dQ kernels do: query tiles, their entries; those that are not partial run without mask.
Visits VisitByQueries(const AttentionSchedule& s, const ops::TokenBatch& batch) {
  Visits visits(batch.subtree_end.size());
  for (int32_t t = 0; t < s.num_backward_tiles; ++t) {
    const QueryTileWork& tile = s.backward_tiles[t];
    EXPECT_EQ(tile.row_begin % kQueryTile, 0);
    for (int32_t e = tile.list_begin; e < tile.list_end; ++e) {
      const KeyRun& run = s.key_runs[s.backward_entries[e]];
      const int32_t half = tile.row_begin / kBackwardQueryTile;
      EXPECT_TRUE(run.first <= half && half + 2 <= run.last);  // both halves have an image
      for (int32_t row = tile.row_begin; row < tile.row_end; ++row) {
        for (int32_t i = 0; i < kKeyTile; ++i) {
          const bool sees = Sees(s, run, i, row);
          EXPECT_TRUE(sees || e - tile.list_begin < tile.partial);
          if (sees) visits[row].push_back(KeyOf(s, batch, run.tile, i));
        }
      }
    }
  }
  return visits;
}

// Rounds split the lists between them; each has images of its own.
void ExpectRounds(const AttentionPlan& plan, const AttentionSchedule& s, int32_t round_images) {
  int32_t tiles = 0, work = 0, most_images = 0;
  for (const BackwardRound& round : plan.rounds) {
    EXPECT_EQ(round.tiles_begin, tiles);
    EXPECT_EQ(round.work_begin, work);
    tiles += round.num_tiles, work += round.num_work;
    most_images = std::max(most_images, round.num_images);
    if (round_images > 0 && round.num_tiles > 1) {
      EXPECT_LE(round.num_images, round_images);
    }
    std::vector<bool> used(round.num_images);                   // no two tile pairs share an image
    int32_t steps_before = INT32_MAX, list_before = INT32_MAX;  // longest first
    for (int32_t w = round.work_begin; w < work; ++w) {
      int32_t steps = 0;
      for (int32_t r = 0; r < s.key_work[w].num_runs; ++r) {
        const KeyRun& run = s.key_runs[s.key_work[w].runs_begin + r];
        for (int32_t t = run.first; t < run.last; ++t) {
          ASSERT_FALSE(used.at(run.image + t));
          used[run.image + t] = true;
        }
        steps += run.last - run.first;
      }
      EXPECT_LE(steps, steps_before);
      steps_before = steps;
    }
    EXPECT_TRUE(std::all_of(used.begin(), used.end(), [](bool image) { return image; }));
    int32_t entries = 0;
    for (int32_t t = round.tiles_begin; t < tiles; ++t) {
      const int32_t list = s.backward_tiles[t].list_end - s.backward_tiles[t].list_begin;
      entries += list;
      EXPECT_LE(list, round.longest_list);
      EXPECT_LE(list, list_before);
      list_before = list;
    }
    EXPECT_EQ(entries, round.num_entries);
  }
  EXPECT_EQ(tiles, s.num_backward_tiles);
  EXPECT_EQ(work, s.num_key_work);
  EXPECT_EQ(most_images, s.num_images);
  EXPECT_EQ(static_cast<int32_t>(plan.rounds.size()), s.num_rounds);
}

// A tile's sums begin in the first round that has it and end in the last.
void ExpectParts(const AttentionSchedule& s) {
  std::map<int32_t, std::vector<int32_t>> parts;  // of each key tile, round by round
  for (int32_t w = 0; w < s.num_key_work; ++w) {
    parts[s.key_work[w].tile].push_back(s.key_work[w].part);
  }
  for (const auto& [tile, list] : parts) {
    if (tile < 0) continue;  // added to the pages in each round
    for (size_t i = 0; i < list.size(); ++i) {
      EXPECT_EQ((list[i] & kBegun) != 0, i > 0) << "tile " << tile;
      EXPECT_EQ((list[i] & kGoesOn) != 0, i + 1 < list.size()) << "tile " << tile;
    }
  }
}

void ExpectBackwardVisits(const ops::TokenBatch& batch, int32_t round_images = 0,
                          int32_t wave_items = 0, bool tiles = true) {
  const AttentionPlan plan = PlanAttention(batch, {.tiles = tiles,
                                                   .backward = true,
                                                   .round_images = round_images,
                                                   .tile_items = 2,
                                                   .wave_items = wave_items});
  const AttentionSchedule s = plan.Bind(plan.words.data());
  Visits want = WantVisits(batch), by_keys = VisitByKeys(s, batch),
         by_queries = VisitByQueries(s, batch);
  for (size_t row = 0; row < want.size(); ++row) {
    for (auto* keys : {&want[row], &by_keys[row], &by_queries[row]}) {
      std::sort(keys->begin(), keys->end());
    }
    ASSERT_EQ(by_keys[row], want[row]) << "row " << row;
    ASSERT_EQ(by_queries[row], want[row]) << "row " << row;
  }
  ExpectRounds(plan, s, round_images);
  ExpectParts(s);
}

TEST(AttentionPlanTest, BackwardMeetsEveryVisibleKeyOnceFromBothSides) {
  for (uint32_t seed = 0; seed < 8; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    for (const int32_t round_images : {0, 1, 9, 40}) {
      SCOPED_TRACE(testing::Message() << "round_images " << round_images);
      ExpectBackwardVisits(RandomBatch(seed), round_images, /*wave_items=*/round_images / 5);
    }
  }
}

ops::TokenBatch ForestOf900Rows() {
  std::mt19937 random(5);
  BatchBuilder b(0);
  std::vector<int32_t> ends;
  while (ends.size() < 900) Grow(ends, random, 3, 150);
  b.Segment(-1, ends);
  return b.batch;
}

TEST(AttentionPlanTest, BackwardHasTilesWhereForwardHasNone) {
  const ops::TokenBatch forest = ForestOf900Rows(), contexts = RandomBatch(3);
  for (const ops::TokenBatch* batch : {&forest, &contexts}) {
    ExpectBackwardVisits(*batch, /*round_images=*/0, /*wave_items=*/0, /*tiles=*/false);
    const AttentionPlan plan = PlanAttention(*batch, {.tiles = false, .backward = true});
    EXPECT_EQ(plan.schedule.num_query_tiles, 0);
    EXPECT_EQ(plan.schedule.num_rounds, 1);
  }
}

TEST(AttentionPlanTest, BackwardWithoutContextSharesForwardsLists) {
  const ops::TokenBatch batch = ForestOf900Rows();
  ExpectBackwardVisits(batch);
  const AttentionPlan plan = PlanAttention(batch, AttentionPlanOptions());
  EXPECT_EQ(plan.schedule.backward_tiles, plan.schedule.query_tiles);
  EXPECT_EQ(plan.schedule.backward_entries, plan.schedule.key_tiles);
  EXPECT_GT(plan.schedule.num_key_work, 0);
  for (const int32_t round_images : {1, 30}) ExpectBackwardVisits(batch, round_images);
}

}  // namespace
}  // namespace coppice::cuda
