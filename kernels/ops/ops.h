// Ops: the table of contents of a transformer, and the only door to a device. cpu::CpuOps is the
// readable twin and the fp32 reference; cuda::CudaOps runs bf16 or f16 with fp32 sums and an fp32
// residual stream. Chosen once at start-up by CreateOps.
//
// Thread: one caller at a time (the engine thread). Work is queued on one stream; host outputs
// (Sample's tokens, log-probs, SumSquares) are valid on return, StartSample's after Wait(),
// everything else after Synchronize().
// Errors: INVALID_ARGUMENT naming op, tensor, want and got for shapes and dtypes; UNIMPLEMENTED
// listing what exists for an unsupported combination; INTERNAL for a device failure, which is
// sticky.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/base/device.h"
#include "kernels/base/tensor_view.h"
#include "kernels/ops/params.h"
#include "kernels/ops/token_batch.h"

namespace coppice::ops {

// A TokenBatch made ready to run: its arrays on the device and the schedule of its attention tiles.
// Built once per batch by Ops::PlanBatch, used by every layer, forward and backward. Borrowed by
// params until the op returns: work that is queued by then keeps what it needs.
class BatchPlan {
 public:
  virtual ~BatchPlan() = default;
  virtual const TokenBatch& batch() const = 0;
  virtual TensorView tokens() const = 0;     // [rows] int32, device
  virtual TensorView positions() const = 0;  // [rows] int32, device
  // [rows] int32, device; absent if the batch stores nothing
  virtual TensorView kv_slots() const = 0;
  virtual TensorView logit_rows() const = 0;  // [head_rows] int32, device
};

// The types f and r of params.h.
struct ActivationTypes {
  DType compute = DType::kF32;
  DType residual = DType::kF32;
};

struct DeviceInfo {
  DeviceKind kind = DeviceKind::kCpu;
  std::string name;  // "cpu AMD EPYC, 2 threads"
  DType compute_dtype = DType::kF32;
  DType residual_dtype = DType::kF32;
  int64_t total_bytes = 0;  // memory of the device
  int64_t free_bytes = 0;
  int64_t op_scratch_bytes = 0;  // the most that ops may still take for themselves
  // Of scores, that TreeAttentionBackward can use in the workspace that it is lent; where that has
  // no room for a quarter of them, it takes memory of its own. 0: it wants no workspace. Shorter
  // heads than `scores_head_dim` want none of scores.
  int64_t score_bytes = 0, scores_head_dim = 0;
  // TreeAttentionBackward takes batches with context and adds to d_context.
  bool context_gradients = false;

  ActivationTypes activation_types() const { return {compute_dtype, residual_dtype}; }
};

// Marks on the device's own timeline, between the ops that are queued around them. Borrows its Ops.
class Timeline {
 public:
  virtual ~Timeline() = default;
  virtual absl::Status Mark() = 0;
  // Seconds of every mark since the first; forgets them. Synchronises.
  virtual absl::StatusOr<std::vector<double>> Take() = 0;
};

// Draws that are queued; their host outputs are not written yet. Borrows the Ops.
class PendingSample {
 public:
  virtual ~PendingSample() = default;
  // Blocks until the draws are done and writes the host outputs; what was queued after them goes
  // on. INVALID_ARGUMENT naming a row with nothing to draw from: its token is -1. Call it once.
  virtual absl::Status Wait() = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;

  virtual DeviceInfo Info() const = 0;

  // Memory. Contents of a new buffer are zero. RESOURCE_EXHAUSTED with want and free bytes.
  virtual absl::StatusOr<DeviceBuffer> Allocate(int64_t size_bytes, absl::string_view label) = 0;
  virtual absl::Status Upload(const void* host, TensorView dst) = 0;  // contiguous, same dtype
  virtual absl::Status Download(TensorView src, void* host) = 0;      // synchronises
  // Same shape; strided matrices allowed; converts dtype.
  virtual absl::Status Copy(TensorView src, TensorView dst) = 0;
  virtual absl::Status Zero(TensorView dst) = 0;  // contiguous
  virtual absl::Status Synchronize() = 0;
  virtual absl::StatusOr<std::unique_ptr<Timeline>> CreateTimeline() = 0;

  // Validates the batch and prepares it. The plan borrows nothing from `batch`.
  virtual absl::StatusOr<std::unique_ptr<BatchPlan>> PlanBatch(const TokenBatch& batch) = 0;

  // Forward.
  virtual absl::Status Embedding(const EmbeddingParams& p) = 0;
  virtual absl::Status GatherRows(const GatherRowsParams& p) = 0;
  virtual absl::Status RmsNorm(const RmsNormParams& p) = 0;
  virtual absl::Status MatMul(const MatMulParams& p) = 0;
  virtual absl::Status QkNormRope(const QkNormRopeParams& p) = 0;
  virtual absl::Status TreeAttention(const TreeAttentionParams& p) = 0;
  virtual absl::Status SwiGlu(const SwiGluParams& p) = 0;
  virtual absl::Status LogProbHead(const LogProbHeadParams& p) = 0;
  // Defined by the ops above, which they call unless a backend knows a shorter way.
  virtual absl::Status NormMatMul(const NormMatMulParams& p);
  virtual absl::Status MatMulSwiGlu(const MatMulSwiGluParams& p);
  virtual absl::Status NormSwiGlu(const NormSwiGluParams& p);
  virtual absl::Status MlpBlock(const MlpBlockParams& p);

  // Backward, mirroring the forward names.
  virtual absl::Status EmbeddingBackward(const EmbeddingBackwardParams& p) = 0;
  virtual absl::Status ScatterAddRows(const ScatterAddRowsParams& p) = 0;
  virtual absl::Status RmsNormBackward(const RmsNormBackwardParams& p) = 0;
  virtual absl::Status SumRows(const SumRowsParams& p) = 0;
  virtual absl::Status QkNormRopeBackward(const QkNormRopeBackwardParams& p) = 0;
  virtual absl::Status TreeAttentionBackward(const TreeAttentionBackwardParams& p) = 0;
  virtual absl::Status SwiGluBackward(const SwiGluBackwardParams& p) = 0;
  virtual absl::Status LogProbHeadBackward(const LogProbHeadBackwardParams& p) = 0;
  virtual absl::Status MatMulSwiGluBackward(const MatMulSwiGluBackwardParams& p);  // as above

  // Generation.
  // Queues the draws: rows and biases are read on return, host outputs written by Wait().
  virtual absl::StatusOr<std::unique_ptr<PendingSample>> StartSample(const SampleParams& p) = 0;
  absl::Status Sample(const SampleParams& p);  // both
  virtual absl::Status CopyBlocks(const CopyBlocksParams& p) = 0;

  // Update.
  virtual absl::StatusOr<double> SumSquares(
      TensorView x) = 0;  // [n] f32|bf16; fixed order of summation
  virtual absl::Status AdamW(const AdamWParams& p) = 0;
};

// A file that says which of the library's algorithms the larger products run by; equal bits for all
// processes that name the same. No path: the library's own first choice.
struct MatMulCacheFile {
  std::string path;
  bool grows = false;  // kinds of products that it lacks are timed, for up to a second, and added
};

// `device`: "cpu" or "cuda" (UNIMPLEMENTED when built without CUDA).
// `threads`: 0 = all cores (CPU only). `deterministic`: a row's bits do not depend on the other
// rows of its batch, nor on which of its keys were cached; the CPU is always so. It covers what
// generation runs; training is repeatable anyway (equal batches, equal bits). `compute_dtype`: the
// type f of params.h on cuda, kBF16 or kF16; the CPU computes in f32 whatever it says.
// `matmul_cache`: see there; for cuda, unless deterministic.
absl::StatusOr<std::unique_ptr<Ops>> CreateOps(absl::string_view device, int threads = 0,
                                               bool deterministic = false,
                                               DType compute_dtype = DType::kBF16,
                                               const MatMulCacheFile& matmul_cache = {});

}  // namespace coppice::ops
