// Launchers: one per kernel family, defined in the .cu of that family, called from the .cc of the
// same name, which has checked shapes and types. Each queues its kernels on `stream` and returns
// the launch's error. `scratch` sizes are given beside them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/vocab_matmul.h"
#include "kernels/ops/params.h"

namespace coppice::cuda {

// Sums over rows are cut into at most this many partial sums, by the number of rows alone: equal
// shapes give equal bits.
constexpr int64_t kMaxPartials = 512;
inline int64_t NumPartials(int64_t rows) { return rows < kMaxPartials ? rows : kMaxPartials; }

// memory.cu
// cudaErrorInvalidDeviceFunction or cudaErrorNoKernelImageForDevice: this build has none for the
// device.
cudaError_t FindKernels();
cudaError_t LaunchCopy(const TensorView& src, const TensorView& dst,
                       cudaStream_t stream);  // matrices
struct BlockPairs {
  static constexpr int kMax = 256;
  int32_t src[kMax];
  int32_t dst[kMax];
};
cudaError_t LaunchCopyBlocks(const TensorView& pool, const BlockPairs& pairs, int n,
                             cudaStream_t stream);

// embedding.cu
cudaError_t LaunchGatherRows(const ops::GatherRowsParams& p, cudaStream_t stream);
cudaError_t LaunchScatterAddRows(const ops::ScatterAddRowsParams& p, cudaStream_t stream);
cudaError_t LaunchEmbeddingBackward(const ops::EmbeddingBackwardParams& p, cudaStream_t stream);

// norm.cu
cudaError_t LaunchRmsNorm(const ops::RmsNormParams& p, cudaStream_t stream);
// norm_backward.cu.  partials: [NumPartials(rows), hidden] f32
cudaError_t LaunchRmsNormBackward(const ops::RmsNormBackwardParams& p, float* partials,
                                  cudaStream_t stream);

// column_sums.cu
// out[j] += sum of partials[i][j] over i, in a fixed order
cudaError_t LaunchAddPartials(const float* partials, int64_t num_partials, int64_t n, float* out,
                              cudaStream_t stream);
cudaError_t LaunchSumRows(const ops::SumRowsParams& p, float* partials, cudaStream_t stream);

// activation.cu
cudaError_t LaunchSwiGlu(const ops::SwiGluParams& p, cudaStream_t stream);
cudaError_t LaunchSwiGluBackward(const ops::SwiGluBackwardParams& p, cudaStream_t stream);

// rope.cu
cudaError_t LaunchQkNormRope(const ops::QkNormRopeParams& p, const int32_t* positions,
                             const int32_t* kv_slots, cudaStream_t stream);
// rope_backward.cu
struct RopeBackwardSide {  // q or k
  TensorView d_out, in, norm, d_in;
  float* d_norm = nullptr;  // [head_dim], +=
};
// partials: [NumPartials(rows), head_dim] f32, used with a norm
cudaError_t LaunchRopeBackward(const RopeBackwardSide& side, float eps, const TensorView& rope,
                               const int32_t* positions, float* partials, cudaStream_t stream);

// logprob_head.cu
struct HeadChunk {
  float* logits = nullptr;  // [rows, vocab] with `ld` floats a row
  int64_t rows = 0, vocab = 0, ld = 0;
  float scale = 1;  // 1 / temperature
  const int32_t* target_indptr =
      nullptr;  // [rows + 1]; values index `targets` and what goes with it
  const int32_t* targets = nullptr;
};
struct HeadStats {
  float* logprobs = nullptr;                 // per target
  float *entropy = nullptr, *lse = nullptr;  // [rows]
};
cudaError_t LaunchHeadStats(const HeadChunk& chunk, const HeadStats& out, cudaStream_t stream);
// Replaces each row of logits by its gradient in 16 bits, in the first half of the row: [rows,
// vocab] with 2 * ld elements a row. target_logits: scratch, one float per target.
struct HeadGradientArgs {
  const float *lse = nullptr, *entropy = nullptr;  // [rows]
  const float* d_logprobs = nullptr;               // per target
  const float* d_entropy = nullptr;                // [rows], or null
  float* target_logits = nullptr;
  DType dtype = DType::kBF16;  // of the gradient
};
cudaError_t LaunchHeadGradient(const HeadChunk& chunk, const HeadGradientArgs& args,
                               cudaStream_t stream);
// Around vocab_matmul.h: statistics of tiles to those of rows, with z of the targets in
// out.logprobs before; the gradient of the logits, [rows, ld] in E, from the exps or in their
// place.
cudaError_t LaunchFoldVocabStats(const VocabMatMulArgs& args, const VocabPartials& partials,
                                 const HeadStats& out, cudaStream_t stream);
cudaError_t LaunchExpsGradient(const VocabMatMulArgs& args, const HeadGradientArgs& gradient,
                               const VocabExps& exps, void* d_logits, cudaStream_t stream);

// sampling.cu
struct SampleOutput {
  int32_t token = 0;
  int32_t drawn = 0;  // 0: nothing to draw from
  float raw = 0, sampled = 0, tempered = 0;
};
struct SampleInputs {
  float* logits = nullptr;  // [n, vocab], `stride` floats a row; biases are added in place
  int64_t n = 0, vocab = 0, stride = 0;
  const ops::SamplingRow* rows = nullptr;
  const int32_t* bias_ids = nullptr;
  const float* bias_values = nullptr;
  float* raw_values = nullptr;  // scratch, one per bias
  int32_t top_logprobs = 0;
  SampleOutput* out = nullptr;  // [n]
  int32_t* drawn = nullptr;     // optional [n]: the tokens again; 0 where nothing was drawn
  int32_t* top_ids = nullptr;   // [n, top_logprobs]
  float* top_values = nullptr;
};
cudaError_t LaunchSample(const SampleInputs& in, cudaStream_t stream);  // compute capability 9.0
cudaError_t LaunchSampleAlone(const SampleInputs& in, cudaStream_t stream);  // any

// adamw.cu.  partials: [kSumSquaresPartials] double
constexpr int64_t kSumSquaresPartials = 1056;
cudaError_t LaunchSumSquares(const TensorView& x, double* partials, cudaStream_t stream);
struct AdamWStep {
  float step_size = 0;   // learning_rate / (1 - beta1^t)
  float inv_sqrt_v = 0;  // 1 / sqrt(1 - beta2^t)
  float decay = 0;       // learning_rate * weight_decay
};
cudaError_t LaunchAdamW(const ops::AdamWParams& p, const AdamWStep& step, cudaStream_t stream);

}  // namespace coppice::cuda
