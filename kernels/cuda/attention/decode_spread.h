// How the decode kernel's work is spread over the blocks of a KV head. Host code, no CUDA.
#pragma once

#include <cstdint>
#include <vector>

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

}  // namespace coppice::cuda
