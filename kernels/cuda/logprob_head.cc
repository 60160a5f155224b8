// The language-model head with log-probs, a chunk of rows at a time, so that the logits (f32) of a
// chunk fit kLogitBytes of scratch. Forward: GEMM, one pass of statistics. Backward: the GEMM
// again, the gradient in place in bf16, two GEMMs.
#include <algorithm>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

constexpr int64_t kLogitBytes = int64_t{2560} << 20;
constexpr int64_t kMaxRows = 4096;

absl::Status CheckTargets(absl::string_view op, const TensorView& indptr, const TensorView& targets,
                          int64_t head_rows, int64_t vocab) {
  const int32_t* begin = indptr.i32();
  ops::ShapeCheck check(op);
  check.That(begin[0] == 0, "target_indptr", "0 at its start", begin[0]);
  for (int64_t r = 0; r < head_rows; ++r) {
    check.That(begin[r] <= begin[r + 1], "target_indptr", "ascending values", begin[r + 1]);
  }
  check.That(begin[head_rows] == targets.dim(0), "target_indptr",
             absl::StrCat(targets.dim(0), " at its end"), begin[head_rows]);
  for (int64_t t = 0; t < targets.dim(0); ++t) {
    const int32_t id = targets.i32()[t];
    check.That(id >= 0 && id < vocab, "targets", absl::StrCat("an id in [0, ", vocab, ")"), id);
  }
  return check.status();
}

// Scratch of one call. Host arrays travel in `floats` and `ints`; per-row and per-target outputs
// come back.
struct Memory {
  float* logits = nullptr;  // [chunk_rows, ld]
  int32_t* indptr = nullptr;
  int32_t* targets = nullptr;
  float *logprobs = nullptr, *entropy = nullptr, *lse = nullptr, *d_entropy = nullptr;
  float* target_logits = nullptr;
  int64_t chunk_rows = 0, ld = 0;
};

Memory LayOut(int64_t head_rows, int64_t num_targets, int64_t vocab, ScratchCursor& cursor) {
  Memory m;
  m.ld = (vocab + 7) / 8 * 8;
  m.chunk_rows = std::clamp<int64_t>(kLogitBytes / (m.ld * 4), 1,
                                     std::min(kMaxRows, std::max<int64_t>(head_rows, 1)));
  m.logits = cursor.Take<float>(m.chunk_rows * m.ld);
  m.indptr = cursor.Take<int32_t>(head_rows + 1);
  m.targets = cursor.Take<int32_t>(num_targets);
  m.logprobs = cursor.Take<float>(num_targets);
  m.entropy = cursor.Take<float>(head_rows);
  m.lse = cursor.Take<float>(head_rows);
  m.d_entropy = cursor.Take<float>(head_rows);
  m.target_logits = cursor.Take<float>(num_targets);
  return m;
}

absl::StatusOr<Memory> Prepare(Context& context, int64_t head_rows, int64_t num_targets,
                               int64_t vocab) {
  ScratchCursor counter(nullptr);
  LayOut(head_rows, num_targets, vocab, counter);
  ASSIGN_OR_RETURN(char* base, context.Scratch(counter.size_bytes()));
  ScratchCursor cursor(base);
  return LayOut(head_rows, num_targets, vocab, cursor);
}

template <typename T>
absl::Status ToDevice(Context& context, const TensorView& host, T* device) {
  return context.Check(cudaMemcpyAsync(device, host.data, host.num_bytes(), cudaMemcpyHostToDevice,
                                       context.stream()),
                       "head upload");
}

// Queues the copy; valid after Synchronize.
template <typename T>
absl::Status ToHost(Context& context, const T* device, const TensorView& host) {
  return context.Check(cudaMemcpyAsync(host.data, device, host.num_bytes(), cudaMemcpyDeviceToHost,
                                       context.stream()),
                       "head download");
}

// Calls fn(chunk, first row) with the chunk's logits in place.
template <typename Fn>
absl::Status ForChunks(Context& context, const TensorView& hidden, const TensorView& weight,
                       float temperature, const Memory& memory, const Fn& fn) {
  const int64_t head_rows = hidden.dim(0), vocab = weight.dim(0);
  for (int64_t row = 0; row < head_rows; row += memory.chunk_rows) {
    const HeadChunk chunk = {.logits = memory.logits,
                             .rows = std::min(memory.chunk_rows, head_rows - row),
                             .vocab = vocab,
                             .ld = memory.ld,
                             .scale = 1.0f / temperature,
                             .target_indptr = memory.indptr + row,
                             .targets = memory.targets};
    TensorView logits = View2D(chunk.logits, DType::kF32, chunk.rows, memory.ld).Cols(0, vocab);
    RETURN_IF_ERROR(MatMul(
        context,
        {.a = hidden.Rows(row, row + chunk.rows), .b = weight, .trans_b = true, .c = logits}));
    RETURN_IF_ERROR(fn(chunk, row));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status LogProbHead(Context& context, const ops::LogProbHeadParams& p) {
  constexpr absl::string_view kOp = "logprob_head";
  const int64_t head_rows = p.hidden.dim(0), hidden = p.hidden.dim(1), vocab = p.weight.dim(0);
  const int64_t num_targets = p.targets.dim(0);
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .Tensor("hidden", p.hidden, DType::kBF16, {head_rows, hidden})
                      .Tensor("weight", p.weight, DType::kBF16, {vocab, hidden})
                      .Tensor("target_indptr", p.target_indptr, DType::kI32, {head_rows + 1})
                      .Tensor("targets", p.targets, DType::kI32, {num_targets})
                      .Tensor("logprobs", p.logprobs, DType::kF32, {num_targets})
                      .Tensor("entropy", p.entropy, DType::kF32, {head_rows})
                      .Tensor("lse", p.lse, DType::kF32, {head_rows})
                      .That(p.temperature > 0, "temperature", "a positive number",
                            static_cast<int64_t>(p.temperature))
                      .status());
  RETURN_IF_ERROR(CheckTargets(kOp, p.target_indptr, p.targets, head_rows, vocab));
  if (head_rows == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Memory memory, Prepare(context, head_rows, num_targets, vocab));
  RETURN_IF_ERROR(ToDevice(context, p.target_indptr, memory.indptr));
  RETURN_IF_ERROR(ToDevice(context, p.targets, memory.targets));
  RETURN_IF_ERROR(ForChunks(
      context, p.hidden, p.weight, p.temperature, memory, [&](const HeadChunk& chunk, int64_t row) {
        return context.Check(LaunchHeadStats(chunk, memory.logprobs, memory.entropy + row,
                                             memory.lse + row, context.stream()),
                             kOp);
      }));
  RETURN_IF_ERROR(ToHost(context, memory.logprobs, p.logprobs));
  RETURN_IF_ERROR(ToHost(context, memory.entropy, p.entropy));
  RETURN_IF_ERROR(ToHost(context, memory.lse, p.lse));
  return context.Synchronize();
}

absl::Status LogProbHeadBackward(Context& context, const ops::LogProbHeadBackwardParams& p) {
  constexpr absl::string_view kOp = "logprob_head_backward";
  const int64_t head_rows = p.hidden.dim(0), hidden = p.hidden.dim(1), vocab = p.weight.dim(0);
  const int64_t num_targets = p.targets.dim(0);
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .Tensor("hidden", p.hidden, DType::kBF16, {head_rows, hidden})
                      .Tensor("weight", p.weight, DType::kBF16, {vocab, hidden})
                      .Tensor("target_indptr", p.target_indptr, DType::kI32, {head_rows + 1})
                      .Tensor("targets", p.targets, DType::kI32, {num_targets})
                      .Tensor("lse", p.lse, DType::kF32, {head_rows})
                      .Tensor("entropy", p.entropy, DType::kF32, {head_rows})
                      .Tensor("d_logprobs", p.d_logprobs, DType::kF32, {num_targets})
                      .Optional("d_entropy", p.d_entropy, DType::kF32, {head_rows})
                      .Tensor("d_hidden", p.d_hidden, DType::kBF16, {head_rows, hidden})
                      .Tensor("d_weight", p.d_weight, DType::kF32, {vocab, hidden})
                      .That(p.temperature > 0, "temperature", "a positive number",
                            static_cast<int64_t>(p.temperature))
                      .status());
  RETURN_IF_ERROR(CheckTargets(kOp, p.target_indptr, p.targets, head_rows, vocab));
  if (head_rows == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(const Memory memory, Prepare(context, head_rows, num_targets, vocab));
  RETURN_IF_ERROR(ToDevice(context, p.target_indptr, memory.indptr));
  RETURN_IF_ERROR(ToDevice(context, p.targets, memory.targets));
  RETURN_IF_ERROR(ToDevice(context, p.lse, memory.lse));
  RETURN_IF_ERROR(ToDevice(context, p.entropy, memory.entropy));
  RETURN_IF_ERROR(ToDevice(context, p.d_logprobs, memory.logprobs));
  if (p.d_entropy.present()) RETURN_IF_ERROR(ToDevice(context, p.d_entropy, memory.d_entropy));
  return ForChunks(
      context, p.hidden, p.weight, p.temperature, memory, [&](const HeadChunk& chunk, int64_t row) {
        const HeadGradientArgs gradient = {
            .lse = memory.lse + row,
            .entropy = memory.entropy + row,
            .d_logprobs = memory.logprobs,
            .d_entropy = p.d_entropy.present() ? memory.d_entropy + row : nullptr,
            .target_logits = memory.target_logits};
        RETURN_IF_ERROR(context.Check(LaunchHeadGradient(chunk, gradient, context.stream()), kOp));
        const TensorView d_logits =
            View2D(chunk.logits, DType::kBF16, chunk.rows, 2 * chunk.ld).Cols(0, vocab);
        RETURN_IF_ERROR(MatMul(
            context, {.a = d_logits, .b = p.weight, .c = p.d_hidden.Rows(row, row + chunk.rows)}));
        return MatMul(context,
                      {.a = d_logits,
                       .b = p.hidden.Rows(row, row + chunk.rows),
                       .trans_a = true,
                       .addend = row > 0 || p.accumulate_d_weight ? p.d_weight : TensorView{},
                       .c = p.d_weight});
      });
}

}  // namespace coppice::cuda
