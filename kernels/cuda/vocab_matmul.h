// The head's product, hidden rows times the vocabulary, folded while it is in registers: no f32
// logits in memory. What is written is a tile's statistics of each row, or the gradient of the
// logits in E, bf16 or f16, which the operands have. Deterministic: a row's bits depend on neither
// its batch nor the launch.
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

// What is left of the logits for backward: exp(z - max) in E, 1 at the largest z of a row's tile,
// so that rounding costs a probability its last bits whatever the logits; and that max. The
// gradient takes the place of exps.
struct VocabExps {
  void* exps = nullptr;  // [rows, ld] E, ld as of d_logits below; null: nothing is left
  float* max = nullptr;  // [tiles, rows]
};

// What d_logits of a row needs besides its logits: with t = z log2(e) - lse_log2,
//   d_logit = -2^t (level + slope t), plus scale * d_logprob at a target.
struct alignas(16) VocabRowGradient {
  float lse_log2 = 0, level = 0, slope = 0, unused = 0;
};

// REQUIRES, of both: sm_90a; rows, vocab, k at least 1 and below 2^30; k and the strides multiples
// of 8; hidden, weight and d_logits on 16-byte boundaries.
//
// target_z: z of each target. exps: [rows, ld] E or null; its max is partials.max.
cudaError_t LaunchVocabStats(const VocabMatMulArgs& args, const VocabPartials& partials,
                             float* target_z, void* exps, cudaStream_t stream);
// d_logits: [rows, ld] E, ld the next multiple of 8 from vocab; what is behind vocab is
// overwritten, too.
cudaError_t LaunchVocabGradient(const VocabMatMulArgs& args, const VocabRowGradient* rows,
                                const float* d_logprobs, void* d_logits, cudaStream_t stream);

}  // namespace coppice::cuda
