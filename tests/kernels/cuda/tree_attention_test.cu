// Tree attention on a GPU against the fp32 reference: small batches (every row), the benchmark's
// shapes (sampled rows), then timings.
//   tree_attention_test [bf16] [f16] [check] [tiny] [trees] [sanitizer] [time] [dualkv] [train]
//                       [decode] [portable] [part=I/N] [only=REGEX]
//   default: check, both types. tiny: a subset; trees: leaves context out; sanitizer: the cases of
//   sanitizer_cases.cuh instead; part: a share of the cases; only: timings like "causal 16384 d128
//   forward", "... backward stored"
// Every case runs on poisoned outputs between guard columns, twice, and compares the two runs bit
// for bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <regex>
#include <string>
#include <vector>

#include "kernels/cuda/overlap.cuh"
#include "tests/kernels/cuda/attention_case.cuh"
#include "tests/kernels/cuda/sanitizer_cases.cuh"
#include "tests/support/tolerances.h"

namespace coppice::cuda {
namespace {

template <typename E>
constexpr double kTolerance = kIsF16<E> ? tolerance::kF16Attention : tolerance::kBf16Attention;

// ||out - want|| / ||want|| over sampled rows, columns [column, column + width) of rows at
// `stride`; NaN if any element is. A lone token's d_q and d_k are zero, hence the floor: an error
// of f32 sums of elements of deviation `unit` is within the tolerance.
template <typename E, typename T>
double RelativeError(const std::vector<T>& out, int64_t stride, int column,
                     const std::vector<float>& want, int width, reference::Sample rows,
                     double unit = 1) {
  double difference = 0, norm = 0;
  for (int r = 0; r < rows.count; ++r) {
    for (int i = 0; i < width; ++i) {
      const double w = want[size_t(r) * width + i];
      const double d = float(out[(rows.first + size_t(r) * rows.stride) * stride + column + i]) - w;
      difference += d * d, norm += w * w;
    }
  }
  const double floor = tolerance::kSumsInAttention * unit / kTolerance<E>;
  return std::sqrt(difference / std::max(norm, floor * floor * rows.count * width));
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// The guard columns behind each row of `out` still hold the poison.
template <typename E>
bool GuardsIntact(const std::vector<E>& out, int64_t stride, int width) {
  for (size_t i = 0; i < out.size(); ++i) {
    const auto* bits = reinterpret_cast<const uint16_t*>(&out[i]);
    if (static_cast<int64_t>(i) % stride >= width && *bits != 0xFFFF) return false;
  }
  return true;
}

// Columns [begin, end) of rows at `stride`.
std::vector<float> Columns(const std::vector<float>& rows, int stride, int begin, int end) {
  std::vector<float> columns;
  for (size_t row = 0; row < rows.size(); row += stride)
    columns.insert(columns.end(), rows.begin() + row + begin, rows.begin() + row + end);
  return columns;
}

// What was added to the slots in use.
template <typename E>
std::vector<float> AddedToPages(const Case<E>& c, const std::vector<float>& pages) {
  std::vector<float> added;
  for (const int32_t slot : c.used_slots) {
    for (int i = 0; i < c.kv_width; ++i)
      added.push_back(pages[size_t(slot) * c.kv_width + i] - kPagesBefore);
  }
  return added;
}

// The same of gradients that were added to pages, over the slots in use; NaN if another slot moved.
template <typename E>
double PagesError(const Case<E>& c, const std::vector<float>& pages,
                  const std::vector<float>& want) {
  const std::vector<float> got = AddedToPages(c, pages);
  std::vector<float> rest = pages;
  for (const int32_t slot : c.used_slots)
    std::fill_n(rest.begin() + size_t(slot) * c.kv_width, c.kv_width, kPagesBefore);
  for (const float value : rest)
    if (value != kPagesBefore) return NAN;
  const int slots = static_cast<int>(c.used_slots.size());
  return RelativeError<E>(got, c.kv_width, 0, want, c.kv_width, {0, 1, slots}, c.unit);
}

int num_failed = 0, num_checked = 0;

// part=I/N: every N-th set of cases, so that N processes share them.
int part = 0, parts = 1;
bool IsOurs() {
  static int next = 0;
  return next++ % parts == part;
}

template <typename E>
void Report(const std::string& name, const Case<E>& c, const char* mode,
            const std::vector<double>& errors, bool repeats, bool guards) {
  bool good = repeats && guards;
  std::string text;
  for (double e : errors) {
    good = good && e < kTolerance<E>;
    char number[16];
    std::snprintf(number, sizeof number, " %.1e", e);
    text += number;
  }
  ++num_checked, num_failed += !good;
  std::printf("%s d%-3d %-26s %-10s rows %6d heads %2d/%d errors%s %s%s%s\n", Name(c.Shape().dtype),
              c.heads.dim, name.c_str(), mode, c.rows, c.heads.q, c.heads.kv, text.c_str(),
              repeats ? "repeats" : "DOES NOT REPEAT", guards ? "" : " GUARD OVERWRITTEN",
              good ? "" : "  FAIL");
  std::fflush(stdout);
}

template <typename E>
reference::Sample EveryRow(const Case<E>& c) {
  return {0, 1, c.rows};
}
template <typename E>
reference::Sample SixteenRows(const Case<E>& c) {
  const int stride = std::max(1, c.rows / 16);
  return {stride / 3, stride, std::min(16, c.rows)};
}

template <typename E>
void CheckForward(const std::string& name, Case<E>& c, const char* mode, reference::Sample rows) {
  c.Poison();
  c.Forward();
  MUST(cudaDeviceSynchronize());
  const auto out = c.out.Host();
  const auto lse = c.lse.Host();
  Buffer<float> want_out(size_t(rows.count) * c.q_width), want_lse(size_t(rows.count) * c.heads.q);
  reference::Problem<E> p = c.Reference();
  p.d_out.data = nullptr;
  reference::QueryRowsKernel<<<dim3(rows.count, c.heads.q), reference::kThreads, 0, nullptr>>>(
      p, rows, want_out.data, want_lse.data, nullptr, nullptr);
  MUST(cudaDeviceSynchronize());
  c.Poison();
  c.Forward();
  MUST(cudaDeviceSynchronize());
  Report(name, c, mode,
         {RelativeError<E>(out, c.out_stride, 0, want_out.Host(), c.q_width, rows),
          RelativeError<E>(lse, c.heads.q, 0, want_lse.Host(), c.heads.q, rows)},
         SameBits(out, c.out.Host()) && SameBits(lse, c.lse.Host()),
         GuardsIntact(out, c.out_stride, c.q_width));
}

template <typename E>
struct Results {
  explicit Results(const Case<E>& c) : out(c.out.Host()), grads(c.d_qkv.Host()), lse(c.lse.Host()) {
    if (c.num_blocks > 0) pages_k = c.d_pages_k->Host(), pages_v = c.d_pages_v->Host();
  }
  bool Same(const Results& o) const {
    return SameBits(out, o.out) && SameBits(grads, o.grads) && SameBits(lse, o.lse) &&
           SameBits(pages_k, o.pages_k) && SameBits(pages_v, o.pages_v);
  }
  std::vector<E> out, grads;
  std::vector<float> lse, pages_k, pages_v;
};

template <typename E>
Results<E> Run(Case<E>& c) {
  c.Poison();
  c.Forward();
  c.Backward();
  MUST(cudaDeviceSynchronize());
  return Results<E>(c);
}

// Forward and backward. With context, every row.
template <typename E>
void CheckBoth(const std::string& name, Case<E>& c, reference::Sample rows) {
  const bool every_row = rows.count == c.rows;
  const Results<E> got = Run(c);
  const size_t num_lse = size_t(rows.count) * c.heads.q;
  const auto num_slots = static_cast<int>(c.used_slots.size());
  Buffer<float> want_out(size_t(rows.count) * c.q_width), want_lse(num_lse), want_delta(num_lse),
      want_dq(want_out.count), want_dk(size_t(rows.count) * c.kv_width), want_dv(want_dk.count),
      delta(c.lse.count), want_pages_k(size_t(num_slots) * c.kv_width),
      want_pages_v(want_pages_k.count);
  const reference::Problem<E> p = c.Reference();
  reference::QueryRowsKernel<<<dim3(rows.count, c.heads.q), reference::kThreads, 0, nullptr>>>(
      p, rows, want_out.data, want_lse.data, want_delta.data, want_dq.data);
  if (!every_row) {
    reference::RowDeltaKernel<<<dim3(c.rows, c.heads.q), 1, 0, nullptr>>>(
        p, {c.out.data, c.out_stride}, delta.data);
  }
  const float* lse = every_row ? want_lse.data : c.lse.data;
  const float* row_delta = every_row ? want_delta.data : delta.data;
  reference::KeyRowsKernel<<<dim3(rows.count, c.heads.kv), reference::kThreads, 0, nullptr>>>(
      p, rows, lse, row_delta, want_dk.data, want_dv.data);
  const Buffer<int32_t> slots(c.used_slots);
  const Buffer<uint8_t> sees(c.Sees());
  if (num_slots > 0) {
    reference::ContextKeysKernel<<<dim3(num_slots, c.heads.kv), reference::kThreads, 0, nullptr>>>(
        p, slots.data, sees.data, lse, row_delta, want_pages_k.data, want_pages_v.data);
  }
  MUST(cudaDeviceSynchronize());
  std::vector<double> errors = {
      RelativeError<E>(got.out, c.out_stride, 0, want_out.Host(), c.q_width, rows),
      RelativeError<E>(got.lse, c.heads.q, 0, want_lse.Host(), c.heads.q, rows),
      RelativeError<E>(got.grads, c.qkv_width, 0, want_dq.Host(), c.q_width, rows, c.unit),
      RelativeError<E>(got.grads, c.qkv_width, c.q_width, want_dk.Host(), c.kv_width, rows, c.unit),
      RelativeError<E>(got.grads, c.qkv_width, c.q_width + c.kv_width, want_dv.Host(), c.kv_width,
                       rows, c.unit)};
  if (num_slots > 0) {
    errors.push_back(PagesError(c, got.pages_k, want_pages_k.Host()));
    errors.push_back(PagesError(c, got.pages_v, want_pages_v.Host()));
  }
  const std::string kernels = c.portable            ? "portable"
                              : c.stored_heads == 0 ? "recompute"
                                                    : "dS of " + std::to_string(c.stored_heads);
  const std::string mode = kernels + ", " + std::to_string(c.schedule.num_rounds) + " rounds";
  Report(name, c, mode.c_str(), errors, got.Same(Run(c)),
         GuardsIntact(got.out, c.out_stride, c.q_width));
}

// Backward on mma.sync behind forward on tiles: against the reference, and, every row of every
// gradient, against the tile kernels. Behind forward on chunks it is a case of its own.
template <typename E>
void CheckPortable(const std::string& name, Case<E>& c, reference::Sample rows) {
  const Results<E> tiles = Run(c);
  c.portable = true;
  CheckBoth(name, c, rows);
  const Results<E> got = Run(c);
  c.portable = false;
  std::vector<double> errors;
  const int begins[] = {0, c.q_width, c.q_width + c.kv_width, c.qkv_width};
  const std::vector<float> want(tiles.grads.begin(), tiles.grads.end());
  for (int i = 0; i < 3; ++i)
    errors.push_back(RelativeError<E>(got.grads, c.qkv_width, begins[i],
                                      Columns(want, c.qkv_width, begins[i], begins[i + 1]),
                                      begins[i + 1] - begins[i], EveryRow(c), c.unit));
  if (c.num_blocks > 0) {
    errors.push_back(PagesError(c, got.pages_k, AddedToPages(c, tiles.pages_k)));
    errors.push_back(PagesError(c, got.pages_v, AddedToPages(c, tiles.pages_v)));
  }
  Report(name, c, "portable by tiles", errors, true, true);
}

struct NamedEnds {
  std::string name;
  Ends ends;
  int q_heads, kv_heads;
};

std::vector<NamedEnds> Trees(bool tiny) {
  // Those first that say most: small parts of `tiny` for the sanitizers begin with them.
  std::vector<NamedEnds> trees = {{"causal 129", Causal(129), 4, 2},
                                  {"forest of short nodes", RandomForest(81, 300, 4, 9), 9, 3},
                                  {"causal 127", Causal(127), 4, 1},
                                  {"single token", Causal(1), 2, 1}};
  if (tiny) return trees;
  const std::vector<NamedEnds> more = {
      {"causal one tile", Causal(128), 1, 1},
      {"causal 256", Causal(256), 4, 1},
      {"causal ragged", Causal(1000), 4, 2},
      {"prompt + 5 x 1", PromptAndResponses(200, 1, 5), 4, 1},
      {"prompt + 8 x 64", PromptAndResponses(384, 64, 8), 8, 2},
      {"prompt + 3 x 177", PromptAndResponses(257, 177, 3), 6, 2},
      {"prompt + 300 x 1", PromptAndResponses(130, 1, 300), 2, 2},
      {"forest depth 4 a", RandomForest(82, 700, 4, 150), 4, 1},
      {"forest depth 4 b", RandomForest(92, 700, 4, 150), 4, 2},
      {"forest depth 4 c", RandomForest(102, 700, 4, 150), 4, 1},
      {"forest depth 4 d", RandomForest(112, 700, 4, 150), 4, 2},
      {"forest of short nodes b", RandomForest(122, 600, 4, 9), 9, 3},
      {"forest of single rows", RandomForest(132, 300, 4, 1), 2, 1},
      {"forest of long nodes", RandomForest(142, 2500, 3, 700), 8, 2},
      {"groups of 5", PromptAndResponses(200, 33, 3), 5, 1},
      {"groups of 7", PromptAndResponses(200, 33, 3), 28, 4},
      {"groups of 8", PromptAndResponses(200, 33, 3), 16, 2},
      {"5 KV heads", PromptAndResponses(200, 33, 3), 20, 5}};
  trees.insert(trees.end(), more.begin(), more.end());
  return trees;
}

template <typename E>
void CheckTrees(bool tiny) {
  uint32_t seed = 1;
  for (const NamedEnds& t : Trees(tiny)) {
    for (int dim : {64, 128, 256}) {
      if (!IsOurs()) continue;
      const ops::TokenBatch batch = BatchOf(t.ends);
      const Heads heads = {t.q_heads, t.kv_heads, dim};
      Case<E> chunks(batch, heads, {.tiles = false}, seed += 10);
      CheckForward(t.name, chunks, "chunks", EveryRow(chunks));
      CheckBoth(t.name, chunks, EveryRow(chunks));
      if (!HasTileKernels(dim, 90)) continue;
      Case<E> tiles(batch, heads, {.tiles = true}, seed);
      for (int stored_heads : {0, 1, t.kv_heads}) {
        tiles.StoreDs(stored_heads);
        CheckBoth(t.name, tiles, EveryRow(tiles));
      }
      CheckPortable(t.name, tiles, EveryRow(tiles));
      Case<E> rounds(batch, heads, {.tiles = true, .round_images = 7}, seed);
      for (int stored_heads : {0, 1, t.kv_heads}) {
        rounds.StoreDs(stored_heads);
        CheckBoth(t.name, rounds, EveryRow(rounds));
      }
    }
  }
}

struct NamedBatch {
  std::string name;
  ops::TokenBatch batch;
};

std::vector<NamedBatch> ContextBatches(int32_t block_tokens, bool tiny) {
  const bool usual = block_tokens >= 16 && block_tokens <= kKeyTile;
  std::vector<NamedBatch> result;
  const auto one = [&](const std::string& name, int32_t context, const Ends& ends) {
    ContextBuilder b(block_tokens);
    b.Segment(b.Node(-1, context), ends);
    result.push_back({name + " bt" + std::to_string(block_tokens), b.Finish()});
  };
  one("ctx 1 + 1", 1, Causal(1));
  {
    ContextBuilder b(block_tokens);  // one context seen from two runs of rows
    const int32_t prompt = b.Node(-1, 2 * block_tokens), other = b.Node(-1, 40);
    b.Segment(prompt, Causal(70));
    b.Segment(other, PromptAndResponses(10, 5, 20));
    b.Segment(b.Node(prompt, 9), Causal(90));
    result.push_back({"ctx apart bt" + std::to_string(block_tokens), b.Finish()});
  }
  if (!usual) return result;
  one("ctx 127 + 130", 127, Causal(130));
  one("ctx 1025 + 1", 1025, Causal(1));
  one("ctx 253 + tree of 8", 253, PromptAndResponses(2, 3, 2));
  {
    ContextBuilder b(block_tokens);  // two levels, decode and prefill side by side
    const int32_t prompt = b.Node(-1, 5 * block_tokens);
    for (int i = 0; i < 3; ++i) b.Segment(b.Node(prompt, 3 + i * block_tokens), Causal(1));
    b.Segment(b.Node(prompt, 77), Causal(200));
    b.Segment(-1, PromptAndResponses(40, 20, 3));
    result.push_back({"mixed bt" + std::to_string(block_tokens), b.Finish()});
  }
  {
    ContextBuilder b(block_tokens);  // requests of their own, short ones beside stacked ones
    const int32_t prompt = b.Node(-1, 2048);
    for (int i = 0; i < 4; ++i) b.Segment(b.Node(prompt, 5 + i), Causal(1));
    b.Segment(b.Node(-1, 100), Causal(1));
    b.Segment(b.Node(-1, 70), Causal(3));
    b.Segment(b.Node(-1, 1100), Causal(2));
    result.push_back({"short beside long bt" + std::to_string(block_tokens), b.Finish()});
  }
  if (tiny) return result;
  one("ctx 128 + 127", 128, Causal(127));
  one("ctx 129 + 128", 129, Causal(128));
  one("ctx 1000 + 129", 1000, Causal(129));
  one("ctx 2500 + tree", 2500, PromptAndResponses(100, 30, 5));
  one("ctx 4096 + 8", 4096, Causal(8));
  for (int samples : {1, 4, 5, 16, 17, 40}) {
    ContextBuilder b(block_tokens);
    const int32_t prompt = b.Node(-1, 2944);
    for (int i = 0; i < samples; ++i) b.Segment(b.Node(prompt, 1 + i * 37 % 300), Causal(1));
    result.push_back(
        {"decode " + std::to_string(samples) + " bt" + std::to_string(block_tokens), b.Finish()});
  }
  ContextBuilder b(block_tokens);  // own tokens of every length, one to eight rows
  const int32_t prompt = b.Node(-1, 1280);
  for (int i = 0; i < 90; ++i) b.Segment(b.Node(prompt, 1 + i * 211 % 1700), Causal(1 + i % 8));
  result.push_back({"decode long bt" + std::to_string(block_tokens), b.Finish()});
  return result;
}

template <typename E>
void CheckContext(bool tiny) {
  uint32_t seed = 5000;
  for (int32_t block_tokens : {16, 64, 128, 8, 256}) {
    for (const NamedBatch& n : ContextBatches(block_tokens, tiny)) {
      for (const Heads heads : {Heads{9, 3, 64}, Heads{8, 2, 128}, Heads{4, 2, 256}}) {
        if (!IsOurs()) continue;
        Case<E> chunks(n.batch, heads, {.tiles = false}, seed += 10);
        CheckForward(n.name, chunks, "chunks", EveryRow(chunks));
        if (!HasTileKernels(heads.dim, 90)) continue;
        Case<E> both(n.batch, heads, {.tiles = true}, seed);
        CheckForward(n.name, both, "tiles", EveryRow(both));
        // Gradients of a few keys are differences of rounded numbers that all but cancel.
        const bool few_keys = both.rows + both.used_slots.size() < 16;
        if (!few_keys) CheckBoth(n.name, chunks, EveryRow(chunks));
        if (!few_keys) CheckPortable(n.name, both, EveryRow(both));
        for (int stored_heads : {0, 1}) {
          if (few_keys) break;
          both.StoreDs(stored_heads);
          CheckBoth(n.name, both, EveryRow(both));
          Case<E> rounds(n.batch, heads, {.tiles = true, .round_images = 5}, seed);
          rounds.StoreDs(stored_heads);
          CheckBoth(n.name, rounds, EveryRow(rounds));
        }
        Case<E> invariant(n.batch, heads, {.tiles = true, .batch_invariant = true}, seed);
        CheckForward(n.name, invariant, "invariant", EveryRow(invariant));
        Case<E> only_tiles(n.batch, heads, {.tiles = true, .max_decode_rows = 0}, seed);
        CheckForward(n.name, only_tiles, "only tiles", EveryRow(only_tiles));
      }
    }
  }
}

// Eight query heads a KV head make an item of eight rows wide; its keys begin at a key tile that is
// no split, and go on into the next chunk.
template <typename E>
void CheckItemAcrossChunks() {
  ContextBuilder b(64);
  b.Segment(b.Node(-1, 1020), Causal(8));
  Case<E> c(b.Finish(), {16, 2, 128}, {.tiles = true}, 41);
  CheckForward("ctx 1020 + 8", c, "tiles", EveryRow(c));
}

// Scores that spread over hundreds of nats: later keys outgrow the base of the exponentials, by
// more than an exponential can hold, too.
template <typename E>
void CheckWideScores() {
  for (const Heads heads : {Heads{8, 2, 64}, Heads{8, 2, 128}}) {
    ContextBuilder b(64);
    const int32_t prompt = b.Node(-1, 2944);
    for (int i = 0; i < 40; ++i) b.Segment(b.Node(prompt, 5 + i), Causal(1));
    Case<E> c(b.Finish(), heads, {}, 43);
    FillKernel<<<1024, 256, 0, nullptr>>>(c.qkv.data, c.rows, c.q_width, c.qkv_width, 44, 60.f);
    CheckForward("wide scores", c, "tiles", EveryRow(c));
  }
}

// A row decodes to the same bits alone, in a small group and in a large one, shared or not.
template <typename E>
void CheckDecodeIgnoresTheBatch() {
  constexpr int kBlockTokens = 64, kPrompt = 2944;
  const auto decode = [&](int samples) {
    ContextBuilder b(kBlockTokens);
    const int32_t prompt = b.Node(-1, kPrompt);
    for (int i = 0; i < samples; ++i) {
      const int32_t own = b.Node(prompt, 100 + i);
      b.Segment(own, Causal(1));
    }
    return b.Finish();
  };
  const Heads heads = {8, 2, 128};
  std::vector<E> first;
  for (int samples : {1, 2, 4, 5, 17, 40}) {
    Case<E> c(decode(samples), heads, {.batch_invariant = true}, 99);
    c.Poison();
    c.Forward();
    MUST(cudaDeviceSynchronize());
    auto out = c.out.Host();
    out.resize(c.q_width);
    if (first.empty()) first = out;
    Report("decode row 0 of " + std::to_string(samples), c, "same bits", {}, SameBits(first, out),
           true);
  }
  Case<E> whole(decode(1), heads, {.tiles = false, .max_decode_rows = 0}, 99);
  whole.Poison();
  whole.Forward();
  MUST(cudaDeviceSynchronize());
  auto out = whole.out.Host();
  out.resize(whole.q_width);
  Report("decode row 0 in one item", whole, "same bits", {}, SameBits(first, out), true);
}

// Starts before the kernels ahead have ended, as those of a decode step do, and takes its time.
__global__ void CopyKernel(uint4* to, const uint4* from, int64_t count) {
  LetSuccessorStart();
  WaitForPredecessor();
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    __nanosleep(500);
    to[i] = from[i];
  }
}
template <typename E>
void Copy(E* to, const E* from, size_t count) {
  MUST(LaunchOverlapped<CopyKernel>({dim3(200), 128}, nullptr, reinterpret_cast<uint4*>(to),
                                    reinterpret_cast<const uint4*>(from),
                                    static_cast<int64_t>(count / 8)));
}

// Layers of a decode step whose kernels start early: each sees its own inputs, and no other's.
template <typename E>
void CheckDecodeChain(int samples, int own) {
  constexpr int kLayers = 40;
  ContextBuilder b(64);
  const int32_t prompt = b.Node(-1, 4096);
  for (int i = 0; i < samples; ++i) b.Segment(b.Node(prompt, own + i % 50), Causal(1));
  Case<E> c(b.Finish(), {32, 8, 128}, {}, 7);
  std::unique_ptr<Buffer<E>> inputs[2];
  std::vector<E> want[2];
  for (int k = 0; k < 2; ++k) {
    inputs[k] = std::make_unique<Buffer<E>>(c.qkv.count);
    FillKernel<<<1024, 256, 0, nullptr>>>(inputs[k]->data, c.rows, c.qkv_width, c.qkv_width, k,
                                          1.f);
    MUST(
        cudaMemcpy(c.qkv.data, inputs[k]->data, c.qkv.count * sizeof(E), cudaMemcpyDeviceToDevice));
    c.out.Poison();
    c.Forward();
    want[k] = c.out.Host();
  }
  Buffer<E> got(c.out.count * kLayers);
  for (int i = 0; i < kLayers; ++i) {
    Copy(c.qkv.data, inputs[i * 7 / 3 % 2]->data, c.qkv.count);
    c.Forward();
    Copy(got.data + i * c.out.count, c.out.data, c.out.count);
  }
  const std::vector<E> all = got.Host();
  bool same = true;
  for (int i = 0; i < kLayers; ++i) {
    same &= std::memcmp(all.data() + i * c.out.count, want[i * 7 / 3 % 2].data(),
                        c.out.count * sizeof(E)) == 0;
  }
  Report("chain of " + std::to_string(samples), c, "same bits", {}, same, true);
}

// dS of fewer heads at a time, to the same bits: many key tiles of little work, in one round and in
// three.
template <typename E>
void CheckHeadsAtATime() {
  for (const Heads heads : {Heads{12, 12, 128}, Heads{6, 6, 256}}) {
    for (int32_t images : {0, 300}) {
      Case<E> c(BatchOf(PromptAndResponses(2, 128, 150)), heads, {.round_images = images}, 55);
      c.StoreDs(heads.kv);
      CheckBoth("150 short responses", c, EveryRow(c));
      const Results<E> all = Run(c);
      c.StoreDs(1);
      Report("150 short responses", c, "one head", {}, all.Same(Run(c)), true);
    }
  }
}

// Many keys have small probabilities, and small gradients come on top: what f16 cannot hold unless
// both are scaled.
template <typename E>
void CheckSmallGradients() {
  for (const Heads heads : {Heads{4, 2, 64}, Heads{4, 2, 128}, Heads{2, 1, 256}}) {
    Case<E> c(BatchOf(Causal(16384)), heads, {}, 66, 0x1p-7f);
    for (int stored_heads : {0, heads.kv}) {
      c.StoreDs(stored_heads);
      CheckBoth("small d_out", c, SixteenRows(c));
    }
    CheckPortable("small d_out", c, SixteenRows(c));
  }
}

template <typename E>
void CheckLarge() {
  const auto one = [](const std::string& name, const Ends& ends, Heads heads) {
    if (!IsOurs()) return;
    Case<E> c(BatchOf(ends), heads, {}, 77);
    for (int stored_heads : {0, 3, heads.kv}) {
      c.StoreDs(stored_heads);
      CheckBoth(name, c, SixteenRows(c));
    }
    CheckPortable(name, c, SixteenRows(c));
    Case<E> rounds(BatchOf(ends), heads, {.round_images = 5000}, 77);
    rounds.StoreDs(heads.kv);
    CheckBoth(name, rounds, SixteenRows(rounds));
    Case<E> chunks(BatchOf(ends), heads, {.tiles = false}, 77);
    CheckForward(name, chunks, "chunks", SixteenRows(chunks));
  };
  one("causal 16384", Causal(16384), {32, 8, 64});
  one("causal 16384", Causal(16384), {32, 8, 128});
  one("causal 16384", Causal(16384), {16, 4, 256});
  one("16384 + 8 x 64", PromptAndResponses(16384, 64, 8), {32, 8, 128});
}

template <typename E>
void RunSanitizerCases() {
  for (const SanitizerCase& s : SanitizerCases(/*all=*/!kIsF16<E>)) {
    if (!IsOurs()) continue;
    const bool good = RunSanitizerCase<E>(s);
    ++num_checked, num_failed += !good;
    std::printf("%s d%-3d %s, dS of %d, rounds of %d: %s\n", kIsF16<E> ? "f16" : "bf16",
                s.heads.dim, s.name.c_str(), s.stored_heads, s.options.round_images,
                good ? "whole" : "FAIL");
    std::fflush(stdout);
  }
}

template <typename Run>
double MedianMs(Run run, int repeats) {
  cudaEvent_t begin, end;
  MUST(cudaEventCreate(&begin));
  MUST(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -2; i < repeats; ++i) {
    MUST(cudaEventRecord(begin));
    run();
    MUST(cudaEventRecord(end));
    MUST(cudaEventSynchronize(end));
    float ms;
    MUST(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 0) times.push_back(ms);
  }
  cudaEventDestroy(begin), cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// After half a second of load: the power limit settles the clock.
template <typename Run>
double SustainedMs(Run run, int repeats) {
  const double once = MedianMs(run, 1);
  for (double warm = 0; warm < 500; warm += once) run();
  return MedianMs(run, repeats);
}

template <typename E>
void PrintTime(const char* op, const std::string& name, Heads heads, const char* mode, double ms,
               double flops, double bytes) {
  std::printf(
      "{\"bench\":\"attention\",\"op\":\"%s\",\"shape\":\"%s\",\"heads\":\"%d/"
      "%d\",\"head_dim\":%d,\"dtype\":\"%s\",\"mode\":\"%s\","
      "\"clock\":\"sustained\",\"ms\":%.4f,\"tflops\":%.1f,\"gb_per_s\":%.0f}\n",
      op, name.c_str(), heads.q, heads.kv, heads.dim, kIsF16<E> ? "f16" : "bf16", mode, ms,
      flops / ms * 1e-9, bytes / ms * 1e-6);
  std::fflush(stdout);
}

std::regex only("");
bool Wanted(const std::string& shape, const Heads& heads, const char* what) {
  return std::regex_search(shape + " d" + std::to_string(heads.dim) + " " + what, only);
}

// Rounds of as many bytes of dS.
AttentionPlanOptions RoundsOf(const Heads& heads, int64_t bytes) {
  const AttentionShape shape = {.q_heads = heads.q, .kv_heads = heads.kv, .head_dim = heads.dim};
  return {.round_images = ImagesOfBytes(shape, bytes),
          .tile_items = QueryTileItems(shape),
          .wave_items = WaveItems()};
}

// Backward with rounds of as many bytes of dS, each; 0: dQ recomputes it.
template <typename E>
void TimeBatch(const std::string& name, const ops::TokenBatch& batch, double pairs, Heads heads,
               const std::vector<int64_t>& round_bytes) {
  const double flops = 4.0 * heads.q * heads.dim * pairs;
  const int repeats = flops > 1e13 ? 7 : 21;
  if (Wanted(name, heads, "forward")) {
    Case<E> c(batch, heads, {}, 7);
    PrintTime<E>("forward", name, heads, "tiles", SustainedMs([&] { c.Forward(); }, repeats), flops,
                 0);
  }
  for (int64_t bytes : round_bytes) {
    if (!Wanted(name, heads, bytes > 0 ? "backward stored" : "backward recompute")) continue;
    const AttentionPlanOptions rounds = RoundsOf(heads, bytes);
    if (bytes > 0 && rounds.round_images == 0) continue;  // never kept
    Case<E> c(batch, heads, rounds, 7);
    c.Forward();
    if (bytes > 0) c.StoreDs(heads.kv);
    const std::string mode = "dS in " + std::to_string(c.schedule.num_rounds) + " rounds";
    PrintTime<E>("backward", name, heads, bytes == 0 ? "recompute" : mode.c_str(),
                 SustainedMs([&] { c.Backward(); }, repeats), 2.5 * flops, 0);
  }
}

template <typename E>
void TimeTree(const std::string& name, const Ends& ends, Heads heads,
              const std::vector<int64_t>& round_bytes) {
  TimeBatch<E>(name, BatchOf(ends), VisiblePairs(ends), heads, round_bytes);
}

// `count` segments of as many rows below one context.
template <typename E>
void TimeBranches(int32_t block_tokens, int context, int rows, int count,
                  const std::vector<int64_t>& round_bytes) {
  ContextBuilder b(block_tokens);
  const int32_t node = b.Node(-1, context);
  for (int i = 0; i < count; ++i) b.Segment(node, Causal(rows));
  const std::string name = std::to_string(count) + " x " + std::to_string(rows) + " over " +
                           std::to_string(context) + " cached bt" + std::to_string(block_tokens);
  TimeBatch<E>(name, b.Finish(), count * (double(rows) * context + VisiblePairs(Causal(rows))),
               {32, 8, 128}, round_bytes);
}

template <typename E>
void TimeDecode(int samples, int prompt_tokens, bool shared) {
  constexpr Heads heads = {32, 8, 128};
  ContextBuilder b(128);
  const int32_t prompt = shared ? b.Node(-1, prompt_tokens) : -1;
  for (int i = 0; i < samples; ++i)
    b.Segment(b.Node(prompt, shared ? 33 : prompt_tokens + 33), Causal(1));
  Case<E> c(b.Finish(), heads, {}, 7);
  const double tokens = (shared ? prompt_tokens : samples * double(prompt_tokens)) + 34.0 * samples;
  const double bytes = tokens * heads.kv * heads.dim * 4;
  const std::string name = std::to_string(samples) + " after " + std::to_string(prompt_tokens);
  PrintTime<E>("decode", name, heads, shared ? "grouped" : "each alone",
               SustainedMs([&] { c.Forward(); }, 51),
               4.0 * samples * (prompt_tokens + 34.0) * heads.q * heads.dim, bytes);
}

template <typename E>
void TimeDecodes() {
  for (int samples : {1, 8, 32, 64}) {
    TimeDecode<E>(samples, 16384, true);
    if (samples < 32) TimeDecode<E>(samples, 16384, false);
  }
  TimeDecode<E>(512, 1024, true);
}

constexpr int64_t kRoundBytes = int64_t{9} << 30;  // as the op has it

template <typename E>
void TimeTrees() {
  TimeTree<E>("causal 16384", Causal(16384), {32, 8, 128}, {0, kRoundBytes});
  TimeTree<E>("causal 16384", Causal(16384), {32, 8, 64}, {0});
  TimeTree<E>("causal 16384", Causal(16384), {16, 4, 256}, {0, kRoundBytes});
  TimeTree<E>("16384 + 8 x 64", PromptAndResponses(16384, 64, 8), {32, 8, 128}, {0, kRoundBytes});
  for (int32_t block_tokens : {16, 128}) TimeBranches<E>(block_tokens, 14336, 2048, 1, {});
}

// Backward on mma.sync, beside the same on tiles.
template <typename E>
void TimePortable() {
  for (const Heads heads : {Heads{32, 8, 128}, Heads{32, 8, 64}, Heads{16, 4, 256}}) {
    const Ends ends = Causal(16384);
    Case<E> c(BatchOf(ends), heads, {}, 7);
    c.Forward();
    for (const bool portable : {false, true}) {
      c.portable = portable;
      PrintTime<E>("backward", "causal 16384", heads, portable ? "portable" : "recompute",
                   SustainedMs([&] { c.Backward(); }, 7),
                   10.0 * heads.q * heads.dim * VisiblePairs(ends), 0);
    }
  }
}

// The shapes that DualKV publishes (arXiv 2605.15422).
template <typename E>
void TimeDualKv() {
  const std::pair<int, int> shapes[] = {{28, 4096}, {28, 16384}, {16, 32768}, {28, 32768}};
  for (const auto& [responses, prompt] : shapes) {
    const std::string name = std::to_string(prompt) + " + " + std::to_string(responses) + " x 2048";
    TimeTree<E>(name, PromptAndResponses(prompt, 2048, responses), {32, 8, 128}, {0, kRoundBytes});
  }
}

// The trees of a training step of qwen3-4b, with the scratch that a step may have.
template <typename E>
void TimeTrainingTrees() {
  for (const auto& [prompt, response] : {std::pair(16384, 64), {16384, 1024}, {8192, 4096}}) {
    const std::string name = std::to_string(prompt) + " + 8 x " + std::to_string(response);
    TimeTree<E>(name, PromptAndResponses(prompt, response, 8), {32, 8, 128},
                {0, kRoundBytes / 4, kRoundBytes});
  }
  TimeBranches<E>(128, 8192, 4096, 4, {kRoundBytes, int64_t{21} << 29});
}

template <typename E, typename Asked>
void RunCases(const Asked& asked, bool check) {
  const bool tiny = asked("tiny");
  if (asked("sanitizer")) RunSanitizerCases<E>();
  if (check) {
    CheckTrees<E>(tiny);
    if (!asked("trees")) CheckContext<E>(tiny);
    if (!asked("trees") && IsOurs()) CheckItemAcrossChunks<E>();
    if (!asked("trees") && IsOurs()) CheckWideScores<E>();
    if (!asked("trees") && IsOurs()) CheckDecodeIgnoresTheBatch<E>();
    for (int samples : {1, 8, 64, 200}) {
      if (!asked("trees") && IsOurs()) CheckDecodeChain<E>(samples, samples == 8 ? 700 : 33);
    }
    if (!tiny && IsOurs()) CheckHeadsAtATime<E>();
    if (!tiny && IsOurs()) CheckSmallGradients<E>();
    if (!tiny) CheckLarge<E>();
  }
  if (asked("time")) TimeTrees<E>();
  if (asked("dualkv")) TimeDualKv<E>();
  if (asked("train")) TimeTrainingTrees<E>();
  if (asked("decode")) TimeDecodes<E>();
  if (asked("portable")) TimePortable<E>();
}

int Main(int count, char** words) {
  const auto asked = [&](const char* word) {
    return std::any_of(words + 1, words + count,
                       [&](const char* w) { return std::strcmp(w, word) == 0; });
  };
  for (int i = 1; i < count; ++i) {
    std::sscanf(words[i], "part=%d/%d", &part, &parts);
    if (std::strncmp(words[i], "only=", 5) == 0) only = words[i] + 5;
  }
  const bool timed =
      asked("time") || asked("dualkv") || asked("train") || asked("decode") || asked("portable");
  const bool check = asked("check") || asked("tiny") || (!timed && !asked("sanitizer"));
  const bool both = asked("bf16") == asked("f16");
  if (both || asked("bf16")) RunCases<Bf16>(asked, check);
  if (both || asked("f16")) RunCases<F16>(asked, check);
  if (num_checked > 0) std::printf("%d cases, %d failed\n", num_checked, num_failed);
  return num_failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace coppice::cuda

int main(int count, char** words) { return coppice::cuda::Main(count, words); }
