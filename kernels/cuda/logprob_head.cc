// The language-model head with log-probs, a chunk of rows at a time, so that what is kept of a
// chunk fits kChunkBytes of scratch. On sm_90 the product folds its logits while they are in
// registers (vocab_matmul.h): forward keeps the statistics of its tiles and, of as many rows as it
// was lent memory for, exps in 16 bits, which backward turns into the gradient; of other rows it
// makes them again. Elsewhere, and where shapes do not suit: a GEMM leaves f32 logits, one pass
// takes their statistics, or puts the gradient in their place. Backward ends with two GEMMs either
// way, and has the same bits whatever was lent.
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

int64_t RowElements(int64_t vocab) { return (vocab + 7) / 8 * 8; }
int64_t StatsRowBytes(int64_t vocab) { return NumVocabTiles(vocab) * 12; }
// Of a row's exps and the maxima of its tiles.
int64_t KeptRowBytes(int64_t vocab) { return RowElements(vocab) * 2 + NumVocabTiles(vocab) * 4; }

int64_t WholeTiles(int64_t rows) { return rows - rows % kRowAlignment; }
// Rows of a chunk if each takes so much of kChunkBytes.
int64_t ChunkRows(int64_t row_bytes, int64_t max_rows) {
  const int64_t rows = std::min(kChunkBytes / row_bytes, max_rows);
  return rows > kRowAlignment ? WholeTiles(rows) : std::max<int64_t>(rows, 1);
}

// What one call works on, and what it keeps of a row of a chunk.
struct Sizes {
  int64_t rows, targets, vocab;
  int64_t row_bytes = 0, chunk_rows = 0;
  // Lent: exps of the first kept_rows rows, then the maxima of their tiles.
  char* kept = nullptr;
  int64_t kept_rows = 0;

  VocabExps Kept() const {
    return {kept, reinterpret_cast<float*>(kept + kept_rows * RowElements(vocab) * 2), kept_rows};
  }
};

// `p`: the parameters of either pass. What is lent holds all rows or whole tiles of them.
template <class Params>
Sizes CommonSizes(const Params& p, bool folds) {
  Sizes sizes = {.rows = p.hidden.dim(0), .targets = p.targets.dim(0), .vocab = p.weight.dim(0)};
  if (!folds || !p.kept.present() || reinterpret_cast<uintptr_t>(p.kept.data) % 16 != 0) {
    return sizes;
  }
  const int64_t fitting = std::min(p.kept.num_bytes() / KeptRowBytes(sizes.vocab),
                                   ChunkRows(StatsRowBytes(sizes.vocab), kMaxStatsRows));
  sizes.kept = static_cast<char*>(p.kept.data);
  sizes.kept_rows = fitting < sizes.rows ? WholeTiles(fitting) : sizes.rows;
  return sizes;
}
Sizes SizesOf(const ops::LogProbHeadParams& p, bool folds) {
  Sizes sizes = CommonSizes(p, folds);
  sizes.row_bytes = folds ? StatsRowBytes(sizes.vocab) : RowElements(sizes.vocab) * 4;
  sizes.chunk_rows = ChunkRows(sizes.row_bytes, folds ? kMaxStatsRows : kMaxLogitRows);
  return sizes;
}
Sizes SizesOf(const ops::LogProbHeadBackwardParams& p, bool folds) {
  Sizes sizes = CommonSizes(p, folds);
  const int64_t elements = RowElements(sizes.vocab);
  sizes.row_bytes = folds ? elements * 2 + StatsRowBytes(sizes.vocab) : elements * 4;
  sizes.chunk_rows = ChunkRows(sizes.row_bytes, folds ? kMaxGradientRows : kMaxLogitRows);
  return sizes;
}

// Scratch of one call: what is kept of a chunk, then device copies of arrays in host memory.
struct Memory {
  char* chunk = nullptr;
  int32_t* indptr = nullptr;
  int32_t* targets = nullptr;
  float *logprobs = nullptr, *entropy = nullptr, *lse = nullptr, *d_entropy = nullptr;
  float* target_logits = nullptr;
  int* counter = nullptr;
};

Memory LayOut(const Sizes& sizes, ScratchCursor& cursor) {
  Memory m;
  m.chunk = cursor.Take<char>(std::min(sizes.rows, sizes.chunk_rows) * sizes.row_bytes);
  m.indptr = cursor.Take<int32_t>(sizes.rows + 1);
  m.targets = cursor.Take<int32_t>(sizes.targets);
  m.logprobs = cursor.Take<float>(sizes.targets);
  m.entropy = cursor.Take<float>(sizes.rows);
  m.lse = cursor.Take<float>(sizes.rows);
  m.d_entropy = cursor.Take<float>(sizes.rows);
  m.target_logits = cursor.Take<float>(sizes.targets);
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

  int64_t count() const { return hidden.dim(0); }
  Rows Part(int64_t begin, int64_t end) const {  // of the chunk's
    return {hidden.Rows(begin, end), weight, first + begin, scale};
  }
};

// Calls fn(rows) for [begin, end), a chunk at a time. `p`: the parameters of either pass.
template <class Params, typename Fn>
absl::Status ForChunks(const Params& p, int64_t begin, int64_t end, int64_t chunk_rows,
                       const Fn& fn) {
  for (int64_t row = begin; row < end; row += chunk_rows) {
    const int64_t next = std::min(end, row + chunk_rows);
    RETURN_IF_ERROR(fn(Rows{p.hidden.Rows(row, next), p.weight, row, 1.0f / p.temperature}));
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

// In scratch from `at` on.
VocabPartials PartialsAt(char* at, const Rows& rows) {
  const int64_t count = NumVocabTiles(rows.weight.dim(0)) * rows.count();
  auto* const values = reinterpret_cast<float*>(at);
  return {values, values + count, values + 2 * count};
}

// `kept`: of these rows, null exps for none.
absl::Status Statistics(Context& context, const Rows& rows, const Memory& memory,
                        const VocabExps& kept, bool folds) {
  const HeadStats out = {.logprobs = memory.logprobs,
                         .entropy = memory.entropy + rows.first,
                         .lse = memory.lse + rows.first};
  if (!folds) {
    ASSIGN_OR_RETURN(const HeadChunk chunk, ComputeLogits(context, rows, memory));
    return context.Check(LaunchHeadStats(chunk, out, context.stream()), "head statistics");
  }
  const VocabMatMulArgs args = ArgsOf(rows, memory);
  VocabPartials partials = PartialsAt(memory.chunk, rows);
  if (kept.exps != nullptr) partials.max = kept.max;
  RETURN_IF_ERROR(
      context.Check(LaunchVocabStats(args, partials, memory.logprobs, kept.exps, context.stream()),
                    "head product"));
  return context.Check(LaunchFoldVocabStats(args, partials, out, context.stream()),
                       "head statistics");
}

HeadGradientArgs GradientArgs(const Rows& rows, const Memory& memory, bool has_d_entropy) {
  return {.lse = memory.lse + rows.first,
          .entropy = memory.entropy + rows.first,
          .d_logprobs = memory.logprobs,
          .d_entropy = has_d_entropy ? memory.d_entropy + rows.first : nullptr,
          .target_logits = memory.target_logits,
          .dtype = rows.hidden.dtype};
}

// The exps of rows again, in scratch: [rows, ld] from `exps` on, their maxima behind `partials`.
absl::StatusOr<VocabExps> ExpsAgain(Context& context, const Rows& rows, const Memory& memory,
                                    char* exps, char* partials) {
  const VocabPartials stats = PartialsAt(partials, rows);
  RETURN_IF_ERROR(context.Check(
      LaunchVocabStats(ArgsOf(rows, memory), stats, memory.target_logits, exps, context.stream()),
      "head product"));
  return VocabExps{exps, stats.max, rows.count()};
}

// The gradient of the rows' logits, in the compute type: from what forward kept or from the exps
// again, the same bits.
absl::StatusOr<TensorView> Gradient(Context& context, const Rows& rows, const Memory& memory,
                                    const Sizes& sizes, bool has_d_entropy) {
  const int64_t ld = RowElements(sizes.vocab), row_bytes = ld * 2;
  const int64_t kept = std::clamp<int64_t>(sizes.kept_rows - rows.first, 0, rows.count());
  const auto launch = [&](const Rows& part, const VocabExps& exps, char* d_logits) {
    return context.Check(
        LaunchExpsGradient(ArgsOf(part, memory), GradientArgs(part, memory, has_d_entropy), exps,
                           d_logits, context.stream()),
        "head gradient");
  };
  if (kept > 0) {
    VocabExps exps = sizes.Kept();
    exps.exps = sizes.kept + rows.first * row_bytes;
    exps.max += rows.first;
    RETURN_IF_ERROR(launch(rows.Part(0, kept), exps, memory.chunk));
  }
  if (kept < rows.count()) {
    const Rows rest = rows.Part(kept, rows.count());
    char* const d_logits = memory.chunk + kept * row_bytes;
    ASSIGN_OR_RETURN(const VocabExps exps, ExpsAgain(context, rest, memory, d_logits,
                                                     memory.chunk + rows.count() * row_bytes));
    RETURN_IF_ERROR(launch(rest, exps, d_logits));
  }
  return View2D(memory.chunk, rows.hidden.dtype, rows.count(), ld).Cols(0, sizes.vocab);
}

// The same where the logits are in memory.
absl::StatusOr<TensorView> GradientOfLogits(Context& context, const Rows& rows,
                                            const Memory& memory, bool has_d_entropy) {
  ASSIGN_OR_RETURN(const HeadChunk chunk, ComputeLogits(context, rows, memory));
  if (chunk.ld > chunk.vocab) {  // the kernel reads whole pieces, to no effect behind vocab
    RETURN_IF_ERROR(context.Check(
        cudaMemset2DAsync(chunk.logits + chunk.vocab, chunk.ld * sizeof(float), 0,
                          (chunk.ld - chunk.vocab) * sizeof(float), chunk.rows, context.stream()),
        "head padding"));
  }
  RETURN_IF_ERROR(context.Check(
      LaunchHeadGradient(chunk, GradientArgs(rows, memory, has_d_entropy), context.stream()),
      "head gradient"));
  return View2D(memory.chunk, rows.hidden.dtype, rows.count(), 2 * chunk.ld).Cols(0, chunk.vocab);
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
  RETURN_IF_ERROR(ForChunks(p, 0, sizes.kept_rows, sizes.chunk_rows, [&](const Rows& rows) {
    return Statistics(context, rows, memory, sizes.Kept(), folds);
  }));
  RETURN_IF_ERROR(
      ForChunks(p, sizes.kept_rows, sizes.rows, sizes.chunk_rows,
                [&](const Rows& rows) { return Statistics(context, rows, memory, {}, folds); }));
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
  const bool has_d_entropy = p.d_entropy.present();
  const auto gradient = [&](const Rows& rows) {
    return folds ? Gradient(context, rows, memory, sizes, has_d_entropy)
                 : GradientOfLogits(context, rows, memory, has_d_entropy);
  };
  return ForChunks(p, 0, sizes.rows, sizes.chunk_rows, [&](const Rows& rows) -> absl::Status {
    ASSIGN_OR_RETURN(const TensorView d_logits, gradient(rows));
    const int64_t end = rows.first + rows.count();
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
