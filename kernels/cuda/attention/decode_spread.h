// How the decode kernel's work is spread over the blocks of a KV head. Host code, no CUDA.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/attention/attention_schedule.h"

namespace coppice::cuda {

// Rows that attend to keys [key_begin, key_end) together; key_begin is a multiple of kKeyTile.
struct DecodeJob {
  int32_t key_begin, key_end;
};

// A run of a job's key tiles, worked on by block `slot` of every KV head.
struct DecodePiece {
  int32_t job, slot;
  int32_t key_begin, key_end;
};

// Short jobs go whole to the slot with the least work, longest first; the others are laid end to
// end and cut at key tiles so that all slots end level. Pieces come by job and key.
// REQUIRES: slots > 0. Cost: O(jobs log jobs + jobs slots).
std::vector<DecodePiece> SpreadDecode(const std::vector<DecodeJob>& jobs, int32_t slots);

// Whether the two warps that a slot has for leaves are through with `leaves` by the time that the
// stacked items of all slots are: together they take twice as long a key, and an item costs as 32.
bool FitBeside(const std::vector<ChunkWork>& leaves, const std::vector<ChunkWork>& stacked);

void SortLongestFirst(std::vector<ChunkWork>& items);

struct DealtItems {
  std::vector<ChunkWork> items;  // slot by slot
  std::vector<int32_t> begins;   // [slots + 1]
};
// Each slot in turn gets the longest item left.
DealtItems DealInTurn(std::vector<ChunkWork> items, int32_t slots);

// A partial result of a row, over keys from `key` on.
struct PartialResult {
  int32_t index, key;
};
// Arrays of AttentionSchedule.
struct MergeLists {
  std::vector<MergeWork> rows;
  std::vector<int32_t> chunks, parts;
  int32_t most_chunks = 0;
};
// The results of each row in the order of their keys, in chunks by the positions of those or as
// they come.
MergeLists PlanMerges(std::vector<std::vector<PartialResult>> rows, bool by_position);

}  // namespace coppice::cuda
