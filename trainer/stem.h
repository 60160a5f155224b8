// The stem of a tree: its leading rows, in whole pages, that every row behind them sees and that
// predict nothing; of a group whose loss is on its responses, the prompt. In the last layer nobody
// reads what attention gives these rows, only their keys and values: so there the rows behind the
// stem run alone, with the stem as context, forward and backward.
//
// Owner and thread: the trainer on the engine thread.
#pragma once

#include <cstdint>

#include "kernels/model/model_config.h"
#include "kernels/ops/ops.h"
#include "kernels/ops/token_batch.h"

namespace coppice {

// 0 where there is no stem: several trees, context already, or loss on the first page.
int64_t StemRows(const ops::TokenBatch& batch);
// The rows behind the first `stem_rows`, hung below them.
ops::TokenBatch BehindStem(const ops::TokenBatch& batch, int64_t stem_rows);

// Keys and values of a stem in the last layer and their gradients, as pages in order.
struct StemPages {
  ops::PagedKv kv;         // f
  ops::PagedKv gradients;  // f32

  static int64_t SizeBytes(const ModelConfig& config, const ops::ActivationTypes& types,
                           int64_t rows);
  // Lays them out in SizeBytes() from `base` on.
  static StemPages Place(const ModelConfig& config, const ops::ActivationTypes& types, int64_t rows,
                         void* base);
};

// How the tree that runs meets its stem.
struct StemLink {
  int64_t rows = 0;
  const ops::BatchPlan* behind = nullptr;  // BehindStem of the tree's batch; null without a stem
  StemPages pages;
  // The pages are this tree's alone: it stores into them and starts their gradients at zero. Else
  // they are a prompt's, which stores its keys and values anyway and has gradients from its
  // branches.
  bool own = false;
};

}  // namespace coppice
