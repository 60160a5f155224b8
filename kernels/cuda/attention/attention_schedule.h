// The schedule of one batch's attention as the kernels read it: a POD of device pointers, made by
// attention_plan.h.
#pragma once

#include <cstdint>

namespace coppice::cuda {

inline constexpr int kKeyTile = 128;           // keys of a tile, every tile kernel
inline constexpr int kQueryTile = 128;         // rows of a query tile, forward and dQ
inline constexpr int kBackwardQueryTile = 64;  // rows of a query tile in the dK/dV kernel
inline constexpr int kSplitKeys = 256;   // keys whose softmax runs in one go, by absolute position
inline constexpr int kChunkKeys = 1024;  // splits of one work item, folded in order
inline constexpr int kChunkRows =
    64;  // stacked rows (row x query head of a KV head) of a wide work item
inline constexpr int kStackedRows = 128;  // of a stacked one, on the wide tensor path
inline constexpr int kNarrowRows = 32;    // of a narrow one
inline constexpr int kLeafRows = 16;      // and of one beside stacked ones
inline constexpr int kArrivalWords = 32;  // a counter has a cache line to itself
inline constexpr int kChunkParts = kChunkKeys / kSplitKeys;  // partial results of a chunk

// Rows [row_begin, row_end), at most kQueryTile, and the entries [list_begin, list_end) of
// `key_tiles` they visit: `partial` of them with mask code first, then full ones, each ascending.
struct QueryTileWork {
  int32_t row_begin, row_end, list_begin, list_end, partial;
  int32_t tail_tokens;  // kKeyTile, or the filled part of the first entry, a context tile whose
                        // rest is to be ignored
};

// Up to kKeyTile tokens of one context node.
struct ContextTile {
  int32_t first_piece;  // index into context_slots: the first slot of each run of min(block_tokens,
                        // kKeyTile) slots, or -1
  int32_t first_end;  // index into context_ends: kKeyTile words, INT32_MAX where there is a token,
                      // else 0
};

// Contiguous rows that see a key tile, as query tiles of 64 rows: [first, full_first) partial,
// [full_first, full_last) full, [full_last, last) partial. Tile pair (query tile t, key tile) is
// image number `image + t`. `first` and `last` are even.
struct KeyRun {
  int32_t tile;  // packed key tile, or context tile ~tile
  int32_t first, full_first, full_last, last, image;
  int32_t row_begin, row_end;  // rows that see a context tile; packed keys are tested one by one
};

// A key tile and its runs key_runs[runs_begin, + num_runs), last rows first. A packed tile has one.
// `part`: where rounds cut its rows, bits of kBegun and kGoesOn.
struct KeyWork {
  int32_t tile, runs_begin, num_runs, part;
};
inline constexpr int32_t kBegun = 1;   // an earlier round has begun its sums
inline constexpr int32_t kGoesOn = 2;  // a later round goes on with them

// Backward goes by rounds of query tiles, last rows first, each with so many images that their dS
// fits in memory. A round has tiles, key work and images of its own, the images from 0 on.
struct BackwardRound {
  int32_t tiles_begin, num_tiles, longest_list, num_entries;  // of backward_tiles
  int32_t work_begin, num_work, num_images;
};

// Stacked rows and the keys they visit. Keys of a path are numbered from 0: first the context's
// tokens by position, then the segment's packed rows. Every row sees all context keys; packed keys
// are tested one by one.
struct ChunkWork {
  int32_t rows_begin, num_rows;  // rows chunk_rows[rows_begin, + num_rows)
  // key_begin: a multiple of kSplitKeys, of kKeyTile where stacked or behind what is stacked for
  // the segment alone. A narrow item holds at most kSplitKeys keys; only such an item, or one whose
  // partial is -1, leaves its chunk.
  int32_t key_begin, key_end;
  int32_t context_tokens;  // keys below are in pages, the others packed
  int32_t first_block;     // index into chunk_blocks: the block of key_begin
  int32_t packed_begin;    // packed row of key `context_tokens`
  int32_t partial;  // index of the first row's partial result, or -1: the item holds all keys of
                    // its rows
};

// Partial results of one row: chunk i of its keys is made of the results merge_parts[begin, end)
// with begin and end at merge_chunks[chunks_begin + i] and after, at most kChunkParts, in the order
// of their keys; all of them are merge_parts[parts_begin, parts_end).
struct MergeWork {
  int32_t row, chunks_begin, num_chunks, parts_begin, parts_end;
};

struct AttentionSchedule {
  const int32_t* subtree_end = nullptr;  // [padded rows], 0 past the last row
  int32_t rows = 0;

  // Tiles.
  const QueryTileWork* query_tiles = nullptr;  // longest list first
  const int32_t* key_tiles = nullptr;          // packed key tile t, or context tile ~t
  const ContextTile* context_tiles = nullptr;
  const int32_t* context_slots = nullptr;
  const int32_t* context_ends = nullptr;
  int32_t num_query_tiles = 0, longest_list = 0, num_list_entries = 0;

  // Tiles, backward. Query tiles lie on multiples of kQueryTile whatever contexts their rows have;
  // in one round packed key tile t is run t and the runs of context tiles follow; of more rounds
  // each has runs of its own.
  const QueryTileWork* backward_tiles = nullptr;  // by rounds, longest list first; no tail_tokens
  const int32_t* backward_entries = nullptr;      // indices into key_runs
  const KeyWork* key_work = nullptr;              // round by round, most rows first
  const KeyRun* key_runs = nullptr;
  int32_t num_backward_tiles = 0, longest_backward_list = 0, num_backward_entries = 0;
  int32_t num_key_work = 0, num_rounds = 0;
  int32_t num_images = 0;  // of the largest round
  int32_t num_context_tiles = 0, num_context_ends = 0;

  // Chunks.
  const ChunkWork* wide_chunks = nullptr;     // up to kChunkRows stacked rows, longest first
  const ChunkWork* narrow_chunks = nullptr;   // up to kNarrowRows stacked rows, one split each
  const ChunkWork* stacked_chunks = nullptr;  // up to kStackedRows stacked rows, slot by slot
  const int32_t* stacked_slots = nullptr;     // [slots + 1] where each slot's items begin
  const ChunkWork* leaf_chunks = nullptr;     // as narrow, up to kLeafRows, slot by slot; `partial`
                                              // never -1
  const int32_t* leaf_slots = nullptr;        // [slots + 1]
  int32_t* arrivals = nullptr;                // [num_arrivals, kArrivalWords] the first word counts
                                              // blocks of a KV head that wait for each other
  const int32_t* chunk_rows = nullptr;
  const int32_t* chunk_blocks = nullptr;
  const MergeWork* merges = nullptr;
  const int32_t* merge_chunks = nullptr;
  const int32_t* merge_parts = nullptr;
  int32_t num_wide = 0, num_narrow = 0, num_merges = 0, num_partials = 0;
  int32_t num_stacked_slots = 0;  // of leaves, too
  // No item's rows were cut, so that no two stacked items have the same keys, but for fewer than
  // kSplitKeys at the end of what is shared: jobs behind it begin with these, read again by each.
  bool stacked_once = true;
  int32_t num_arrivals = 0;  // KV heads
  int32_t narrow_rows = 0;   // stacked rows of the largest narrow item
  int32_t most_chunks = 0;   // of a merge
};

}  // namespace coppice::cuda
