// The head's product, hidden rows times the vocabulary, folded while it is in registers: no f32
// logits in memory. What is written is a tile's statistics of each row and, if asked for, the exps
// of its logits in E, bf16 or f16, which the operands have. Deterministic: a row's bits depend on
// neither its batch nor the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/base/dtype.h"

namespace coppice::cuda {

constexpr int64_t kVocabTile = 256;  // tokens of a tile
inline int64_t NumVocabTiles(int64_t vocab) { return (vocab + kVocabTile - 1) / kVocabTile; }

// z = scale * hidden weight^T
struct VocabMatMulArgs {
  const void* hidden = nullptr;  // [rows, k] E
  int64_t hidden_stride = 0;
  const void* weight = nullptr;  // [vocab, k] E
  int64_t weight_stride = 0;
  int64_t rows = 0, vocab = 0, k = 0;
  float scale = 1;
  DType dtype = DType::kBF16;              // E
  const int32_t* target_indptr = nullptr;  // [rows + 1]; values index `targets` and their arrays
  const int32_t* targets = nullptr;
  int* counter = nullptr;  // scratch: who does what
};

// Of one row over the tokens of a tile; each [tiles, rows].
struct VocabPartials {
  float* max = nullptr;       // of z
  float* sum = nullptr;       // sum exp(z - max)
  float* weighted = nullptr;  // sum exp(z - max) (z - max)
};

// What backward needs of the logits: exp(z - max) in E, 1 at the largest z of a row's tile, so that
// rounding costs a probability its last bits whatever the logits; and that max.
struct VocabExps {
  void* exps = nullptr;  // [rows, ld] E, ld the next multiple of 8 from vocab; 0 behind vocab
  float* max = nullptr;  // [tiles, max_stride]
  int64_t max_stride = 0;
};

// target_z: z of each target. exps: as in VocabExps, whose max then is partials.max; or null.
// REQUIRES: sm_90a; rows, vocab, k at least 1 and below 2^30; k and the strides multiples of 8;
// hidden, weight and exps on 16-byte boundaries.
cudaError_t LaunchVocabStats(const VocabMatMulArgs& args, const VocabPartials& partials,
                             float* target_z, void* exps, cudaStream_t stream);

}  // namespace coppice::cuda
