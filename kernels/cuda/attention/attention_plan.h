// AttentionPlan: which tiles of the score matrix a batch touches. Host code, no CUDA.
//
// Key row k is visible to query row q iff k <= q < subtree_end[k]; a segment's rows also see their
// context. Three kernel families share the work, by segment:
//   tiles    128 x 128 tiles on the tensor cores' wide path (sm_90a): prefill, scoring, training
//   stacked  stacked query heads on the same path: decode over context that more than kNarrowRows
//            of them share or that is long; all key tiles are dealt out evenly. The rest of the
//            rows' keys, their leaves, goes with it if it is little.
//   chunks   stacked query heads on mma.sync, keys in chunks of 1024 by absolute position: other
//            decode (each shared context node is read once for all its rows), every other
//            architecture and head_dim, and the oracle
// For a query tile [q0, q1) and a key tile [k0, k1), with lo and hi the least and greatest
// subtree_end of the key tile:
//   skip iff k0 >= q1 or hi <= q0;  full iff k1 - 1 <= q0 and lo >= q1 (no mask code runs);  else
//   partial.
// Plans depend on neither head nor layer. All of a plan is one vector of words: upload it once,
// bind, launch often. Cost: O(tiles^2 + context blocks) on the host, below a millisecond for 41k
// rows.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cuda/attention/attention_schedule.h"
#include "kernels/ops/token_batch.h"

namespace coppice::cuda {

struct AttentionPlanOptions {
  bool tiles = true;         // false: everything as chunks (see HasTileKernels)
  bool stacked = true;       // shared context on the wide tensor path (see HasStackedKernels)
  bool backward = false;     // with what backward needs; tiles without context always have it
  int32_t round_images = 0;  // images of a round of backward at most; 0: one round
  // Backward's dQ has so many items of work a query tile, and so many run at once: rounds hold
  // query tiles of whole waves. 0: of any number.
  int32_t tile_items = 0, wave_items = 0;
  int32_t group_size = 1;  // query heads of a KV head
  int32_t kv_heads = 1;    // at least those of a launch that stacks
  bool batch_invariant =
      false;  // true: a row's bits do not depend on the other rows of the batch; costs speed
  int32_t decode_slots = 16;    // blocks of a KV head that share stacked work (see DecodeSlots)
  int32_t max_decode_rows = 8;  // segments with context and at most as many rows go as chunks
  // Context of so many keys goes stacked however few rows it has; behind keys that others share a
  // key tile of it does.
  int32_t long_keys = 512;

  bool operator==(const AttentionPlanOptions&) const = default;
};

struct AttentionPlan {
  std::vector<int32_t> words;         // the schedule's arrays
  AttentionSchedule schedule;         // its pointers are offsets into `words` until Bind
  std::vector<BackwardRound> rounds;  // at least one with key work, which batches may lack
  bool has_context = false;
  // The schedule over an uploaded copy of `words`, 16-byte aligned.
  AttentionSchedule Bind(const int32_t* device_words) const;
};

// REQUIRES: batch.Validate() is OK; block_tokens is a power of two and at least 8 if there is
// context.
AttentionPlan PlanAttention(const ops::TokenBatch& batch, const AttentionPlanOptions& options);

}  // namespace coppice::cuda
