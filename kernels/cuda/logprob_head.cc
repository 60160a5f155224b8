// The language-model head with log-probs, a chunk of rows at a time, so that what is kept of a
// chunk fits kChunkBytes of scratch. On sm_90 the product folds its logits while they are in
// registers (vocab_matmul.h): forward keeps the statistics of its tiles, backward the gradient in
// 16 bits, or makes it of what forward kept of the logits in memory that the caller lent.
// Elsewhere, and where shapes do not suit: a GEMM leaves f32 logits, one pass takes their
// statistics, or puts the gradient in their place. Backward ends with two GEMMs either way.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/vocab_matmul.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

constexpr int64_t kChunkBytes = int64_t{2560} << 20;
// Rows of a chunk at most, by what is kept of them.
constexpr int64_t kMaxLogitRows = 4096, kMaxGradientRows = 8192, kMaxStatsRows = 32768;
constexpr int64_t kRowAlignment = 256;  // of chunks: whole tiles of the product

absl::Status CheckTargets(absl::string_view op, const TensorView& indptr, const TensorView& targets,
                          int64_t head_rows, int64_t vocab) {
  const int32_t *begin = indptr.i32(), *last = begin + head_rows;
  ops::ShapeCheck check(op);
  check.That(*begin == 0, "target_indptr", "0 at its start", *begin);
  const int32_t* unsorted = std::is_sorted_until(begin, last + 1);
  if (unsorted <= last) check.That(false, "target_indptr", "ascending values", *unsorted);
  if (*last != targets.dim(0)) {
    check.That(false, "target_indptr", absl::StrCat(targets.dim(0), " at its end"), *last);
  }
  const int32_t *ids = targets.i32(), *end = ids + targets.dim(0);
  const int32_t* bad = std::find_if(ids, end, [&](int32_t id) { return id < 0 || id >= vocab; });
  if (bad != end) check.That(false, "targets", absl::StrCat("an id in [0, ", vocab, ")"), *bad);
  return check.status();
}

bool IsWide(const TensorView& t) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.dim(1) > 0 && t.dim(1) % 8 == 0 &&
         t.stride[0] % 8 == 0;
}
// Whether the product that folds its logits takes these.
bool Folds(const Context& context, const TensorView& hidden, const TensorView& weight) {
  constexpr int64_t kMaxVocab = int64_t{1} << 30;
  return context.compute_capability() == 90 && IsWide(hidden) && IsWide(weight) &&
         weight.dim(0) < kMaxVocab;
}

// What one call works on, and what it keeps of a row of a chunk.
struct Sizes {
  int64_t rows, targets, vocab;
  int64_t row_bytes = 0, max_rows = 0;
  char* kept = nullptr;  // null, or where all rows' exps are, a chunk behind the other

  int64_t chunk_rows() const {
    int64_t fitting = row_bytes > 0 ? std::min(kChunkBytes / row_bytes, max_rows) : max_rows;
    if (fitting > kRowAlignment) fitting -= fitting % kRowAlignment;
    return std::clamp<int64_t>(rows, 1, std::max<int64_t>(fitting, 1));
  }
};
int64_t RowElements(int64_t vocab) { return (vocab + 7) / 8 * 8; }
// Of a row's exps and the maxima of its tiles.
int64_t KeptRowBytes(int64_t vocab) { return RowElements(vocab) * 2 + NumVocabTiles(vocab) * 4; }

// `p`: the parameters of either pass. What is lent is used for all rows or not at all, so that both
// passes agree.
template <class Params>
Sizes CommonSizes(const Params& p, bool folds) {
  Sizes sizes = {.rows = p.hidden.dim(0), .targets = p.targets.dim(0), .vocab = p.weight.dim(0)};
  const bool fits = folds && p.kept.present() &&
                    reinterpret_cast<uintptr_t>(p.kept.data) % 16 == 0 &&
                    p.kept.num_bytes() >= sizes.rows * KeptRowBytes(sizes.vocab);
  if (fits) sizes.kept = static_cast<char*>(p.kept.data);
  return sizes;
}
Sizes SizesOf(const ops::LogProbHeadParams& p, bool folds) {
  Sizes sizes = CommonSizes(p, folds);
  sizes.row_bytes = folds ? NumVocabTiles(sizes.vocab) * 12 : RowElements(sizes.vocab) * 4;
  sizes.max_rows = folds ? kMaxStatsRows : kMaxLogitRows;
  return sizes;
}
Sizes SizesOf(const ops::LogProbHeadBackwardParams& p, bool folds) {
  Sizes sizes = CommonSizes(p, folds);
  if (sizes.kept != nullptr) {  // the chunks of forward; nothing is kept of them here
    sizes.max_rows = kMaxStatsRows;
    return sizes;
  }
  sizes.row_bytes = RowElements(sizes.vocab) * (folds ? 2 : 4);
  sizes.max_rows = folds ? kMaxGradientRows : kMaxLogitRows;
  return sizes;
}

// Scratch of one call: what is kept of a chunk, then device copies of arrays in host memory.
struct Memory {
  char* chunk = nullptr;
  int32_t* indptr = nullptr;
  int32_t* targets = nullptr;
  float *logprobs = nullptr, *entropy = nullptr, *lse = nullptr, *d_entropy = nullptr;
  float* target_logits = nullptr;
  VocabRowGradient* row_gradients = nullptr;  // of a chunk
  int* counter = nullptr;
};

Memory LayOut(const Sizes& sizes, ScratchCursor& cursor) {
  Memory m;
  m.chunk = cursor.Take<char>(sizes.chunk_rows() * sizes.row_bytes);
  m.indptr = cursor.Take<int32_t>(sizes.rows + 1);
  m.targets = cursor.Take<int32_t>(sizes.targets);
  m.logprobs = cursor.Take<float>(sizes.targets);
  m.entropy = cursor.Take<float>(sizes.rows);
  m.lse = cursor.Take<float>(sizes.rows);
  m.d_entropy = cursor.Take<float>(sizes.rows);
  m.target_logits = cursor.Take<float>(sizes.targets);
  m.row_gradients = cursor.Take<VocabRowGradient>(sizes.chunk_rows());
  m.counter = cursor.Take<int>(1);
  return m;
}

absl::StatusOr<Memory> Prepare(Context& context, const Sizes& sizes) {
  ScratchCursor counter(nullptr);
  LayOut(sizes, counter);
  ASSIGN_OR_RETURN(char* base, context.Scratch(counter.size_bytes()));
  ScratchCursor cursor(base);
  return LayOut(sizes, cursor);
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

// Rows of one chunk: [first, first + hidden.dim(0)) of the call's.
struct Rows {
  TensorView hidden, weight;
  int64_t first;
  float scale;
  VocabExps kept;
};
VocabExps KeptOf(const Sizes& sizes, int64_t first, int64_t end) {
  if (sizes.kept == nullptr) return {};
  char* const exps = sizes.kept + first * KeptRowBytes(sizes.vocab);
  char* const max = exps + (end - first) * RowElements(sizes.vocab) * 2;
  return {exps, reinterpret_cast<float*>(max)};
}

// Calls fn(rows) chunk by chunk. `p`: the parameters of either pass.
template <class Params, typename Fn>
absl::Status ForChunks(const Params& p, const Sizes& sizes, const Fn& fn) {
  for (int64_t row = 0; row < sizes.rows; row += sizes.chunk_rows()) {
    const int64_t end = std::min(sizes.rows, row + sizes.chunk_rows());
    RETURN_IF_ERROR(fn(Rows{p.hidden.Rows(row, end), p.weight, row, 1.0f / p.temperature,
                            KeptOf(sizes, row, end)}));
  }
  return absl::OkStatus();
}

VocabMatMulArgs ArgsOf(const Rows& rows, const Memory& memory) {
  return {.hidden = rows.hidden.data,
          .hidden_stride = rows.hidden.stride[0],
          .weight = rows.weight.data,
          .weight_stride = rows.weight.stride[0],
          .rows = rows.hidden.dim(0),
          .vocab = rows.weight.dim(0),
          .k = rows.hidden.dim(1),
          .scale = rows.scale,
          .dtype = rows.hidden.dtype,
          .target_indptr = memory.indptr + rows.first,
          .targets = memory.targets,
          .counter = memory.counter};
}

// Logits of the rows, in f32.
absl::StatusOr<HeadChunk> ComputeLogits(Context& context, const Rows& rows, const Memory& memory) {
  const int64_t num_rows = rows.hidden.dim(0), vocab = rows.weight.dim(0);
  const HeadChunk chunk = {.logits = reinterpret_cast<float*>(memory.chunk),
                           .rows = num_rows,
                           .vocab = vocab,
                           .ld = RowElements(vocab),
                           .scale = rows.scale,
                           .target_indptr = memory.indptr + rows.first,
                           .targets = memory.targets};
  const TensorView logits = View2D(chunk.logits, DType::kF32, num_rows, chunk.ld).Cols(0, vocab);
  RETURN_IF_ERROR(
      MatMul(context, {.a = rows.hidden, .b = rows.weight, .trans_b = true, .c = logits}));
  return chunk;
}

absl::Status Statistics(Context& context, const Rows& rows, const Memory& memory, bool folds) {
  const HeadStats out = {.logprobs = memory.logprobs,
                         .entropy = memory.entropy + rows.first,
                         .lse = memory.lse + rows.first};
  if (!folds) {
    ASSIGN_OR_RETURN(const HeadChunk chunk, ComputeLogits(context, rows, memory));
    return context.Check(LaunchHeadStats(chunk, out, context.stream()), "head statistics");
  }
  const VocabMatMulArgs args = ArgsOf(rows, memory);
  const int64_t count = NumVocabTiles(args.vocab) * args.rows;
  auto* values = reinterpret_cast<float*>(memory.chunk);
  VocabPartials partials = {values, values + count, values + 2 * count};
  if (rows.kept.max != nullptr) partials.max = rows.kept.max;
  RETURN_IF_ERROR(context.Check(
      LaunchVocabStats(args, partials, memory.logprobs, rows.kept.exps, context.stream()),
      "head product"));
  return context.Check(LaunchFoldVocabStats(args, partials, out, context.stream()),
                       "head statistics");
}

// The gradient of the rows' logits, in the compute type.
absl::StatusOr<TensorView> Gradient(Context& context, const Rows& rows, const Memory& memory,
                                    bool has_d_entropy, bool folds) {
  const HeadGradientArgs gradient = {
      .lse = memory.lse + rows.first,
      .entropy = memory.entropy + rows.first,
      .d_logprobs = memory.logprobs,
      .d_entropy = has_d_entropy ? memory.d_entropy + rows.first : nullptr,
      .target_logits = memory.target_logits,
      .dtype = rows.hidden.dtype};
  const int64_t num_rows = rows.hidden.dim(0), vocab = rows.weight.dim(0), ld = RowElements(vocab);
  if (!folds) {
    ASSIGN_OR_RETURN(const HeadChunk chunk, ComputeLogits(context, rows, memory));
    RETURN_IF_ERROR(
        context.Check(LaunchHeadGradient(chunk, gradient, context.stream()), "head gradient"));
    return View2D(memory.chunk, rows.hidden.dtype, num_rows, 2 * ld).Cols(0, vocab);
  }
  const VocabMatMulArgs args = ArgsOf(rows, memory);
  RETURN_IF_ERROR(
      context.Check(LaunchVocabRowGradients(args, gradient, memory.row_gradients, context.stream()),
                    "head gradient"));
  if (rows.kept.exps != nullptr) {
    RETURN_IF_ERROR(context.Check(
        LaunchExpsGradient(args, gradient, memory.row_gradients, rows.kept, context.stream()),
        "head gradient"));
    return View2D(rows.kept.exps, rows.hidden.dtype, num_rows, ld).Cols(0, vocab);
  }
  RETURN_IF_ERROR(context.Check(LaunchVocabGradient(args, memory.row_gradients, memory.logprobs,
                                                    memory.chunk, context.stream()),
                                "head product"));
  return View2D(memory.chunk, rows.hidden.dtype, num_rows, ld).Cols(0, vocab);
}

}  // namespace

absl::Status LogProbHead(Context& context, const ops::LogProbHeadParams& p) {
  constexpr absl::string_view kOp = "logprob_head";
  const DType compute = context.compute_dtype();
  const int64_t head_rows = p.hidden.dim(0), hidden = p.hidden.dim(1), vocab = p.weight.dim(0);
  const int64_t num_targets = p.targets.dim(0);
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .Tensor("hidden", p.hidden, compute, {head_rows, hidden})
                      .Tensor("weight", p.weight, compute, {vocab, hidden})
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
  const bool folds = Folds(context, p.hidden, p.weight);
  const Sizes sizes = SizesOf(p, folds);
  ASSIGN_OR_RETURN(const Memory memory, Prepare(context, sizes));
  RETURN_IF_ERROR(ToDevice(context, p.target_indptr, memory.indptr));
  RETURN_IF_ERROR(ToDevice(context, p.targets, memory.targets));
  RETURN_IF_ERROR(ForChunks(
      p, sizes, [&](const Rows& rows) { return Statistics(context, rows, memory, folds); }));
  RETURN_IF_ERROR(ToHost(context, memory.logprobs, p.logprobs));
  RETURN_IF_ERROR(ToHost(context, memory.entropy, p.entropy));
  RETURN_IF_ERROR(ToHost(context, memory.lse, p.lse));
  return context.Synchronize();
}

absl::Status LogProbHeadBackward(Context& context, const ops::LogProbHeadBackwardParams& p) {
  constexpr absl::string_view kOp = "logprob_head_backward";
  const DType compute = context.compute_dtype();
  const int64_t head_rows = p.hidden.dim(0), hidden = p.hidden.dim(1), vocab = p.weight.dim(0);
  const int64_t num_targets = p.targets.dim(0);
  RETURN_IF_ERROR(ops::ShapeCheck(kOp)
                      .Tensor("hidden", p.hidden, compute, {head_rows, hidden})
                      .Tensor("weight", p.weight, compute, {vocab, hidden})
                      .Tensor("target_indptr", p.target_indptr, DType::kI32, {head_rows + 1})
                      .Tensor("targets", p.targets, DType::kI32, {num_targets})
                      .Tensor("lse", p.lse, DType::kF32, {head_rows})
                      .Tensor("entropy", p.entropy, DType::kF32, {head_rows})
                      .Tensor("d_logprobs", p.d_logprobs, DType::kF32, {num_targets})
                      .Optional("d_entropy", p.d_entropy, DType::kF32, {head_rows})
                      .Tensor("d_hidden", p.d_hidden, compute, {head_rows, hidden})
                      .Tensor("d_weight", p.d_weight, DType::kF32, {vocab, hidden})
                      .That(p.temperature > 0, "temperature", "a positive number",
                            static_cast<int64_t>(p.temperature))
                      .status());
  RETURN_IF_ERROR(CheckTargets(kOp, p.target_indptr, p.targets, head_rows, vocab));
  if (head_rows == 0) return absl::OkStatus();
  const bool folds = Folds(context, p.hidden, p.weight);
  const Sizes sizes = SizesOf(p, folds);
  ASSIGN_OR_RETURN(const Memory memory, Prepare(context, sizes));
  RETURN_IF_ERROR(ToDevice(context, p.target_indptr, memory.indptr));
  RETURN_IF_ERROR(ToDevice(context, p.targets, memory.targets));
  RETURN_IF_ERROR(ToDevice(context, p.lse, memory.lse));
  RETURN_IF_ERROR(ToDevice(context, p.entropy, memory.entropy));
  RETURN_IF_ERROR(ToDevice(context, p.d_logprobs, memory.logprobs));
  if (p.d_entropy.present()) RETURN_IF_ERROR(ToDevice(context, p.d_entropy, memory.d_entropy));
  return ForChunks(p, sizes, [&](const Rows& rows) -> absl::Status {
    ASSIGN_OR_RETURN(const TensorView d_logits,
                     Gradient(context, rows, memory, p.d_entropy.present(), folds));
    const int64_t end = rows.first + rows.hidden.dim(0);
    RETURN_IF_ERROR(
        MatMul(context, {.a = d_logits, .b = p.weight, .c = p.d_hidden.Rows(rows.first, end)}));
    const bool add = rows.first > 0 || p.accumulate_d_weight;
    return MatMul(context, {.a = d_logits,
                            .b = rows.hidden,
                            .trans_a = true,
                            .addend = add ? p.d_weight : TensorView{},
                            .c = p.d_weight});
  });
}

}  // namespace coppice::cuda
