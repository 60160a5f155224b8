// Tree attention on a GPU against the fp32 reference: small batches (every row), the benchmark's
// shapes (sampled rows), then timings.
//   tree_attention_test [check] [tiny] [time] [decode]     default: check. tiny: a subset for the
//   sanitizers
// Every case runs on poisoned outputs between guard columns, twice, and compares the two runs bit
// for bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/attention/attention_plan.h"
#include "kernels/cuda/attention/tree_attention.h"
#include "tests/kernels/cuda/attention_reference.cuh"
#include "tests/support/tolerances.h"

namespace coppice::cuda {
namespace {

using Bf16 = __nv_bfloat16;

void Must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define MUST(call) Must(call, #call)

template <typename T>
struct Buffer {
  T* data = nullptr;
  size_t count = 0;
  explicit Buffer(size_t n) : count(n) {
    MUST(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T)));
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    MUST(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
  void Poison() { MUST(cudaMemset(data, 0xFF, count * sizeof(T))); }  // NaN in bf16 and f32
  std::vector<T> Host() const {
    std::vector<T> out(count);
    MUST(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
};

__device__ uint32_t Mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352dU, x ^= x >> 15, x *= 0x846ca68bU, x ^= x >> 16;
  return x;
}
// Roughly normal, unit variance: the sum of four uniforms. Element (i, c) of [n, width] rows at
// `stride`.
__global__ void FillKernel(Bf16* out, int64_t n, int width, int64_t stride, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n * width;
       i += int64_t{gridDim.x} * blockDim.x) {
    float sum = 0.f;
    for (uint32_t j = 0; j < 4; ++j) {
      sum += Mix(static_cast<uint32_t>(i) * 4 + j + Mix(seed + static_cast<uint32_t>(i >> 30))) *
                 0x1p-32f -
             0.5f;
    }
    out[i / width * stride + i % width] = __float2bfloat16(sum * 1.7320508f);
  }
}
// The same for the listed slots of pages.
__global__ void FillSlotsKernel(Bf16* pages, const int* slots, int64_t n, int width,
                                uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n * width;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t at = slots[i / width] * int64_t{width} + i % width;
    const uint32_t x = Mix(static_cast<uint32_t>(at) + Mix(seed));
    pages[at] = __float2bfloat16((x * 0x1p-32f - 0.5f) * 3.46f);
  }
}

using Ends = std::vector<int32_t>;

Ends Causal(int rows) { return Ends(rows, rows); }

Ends PromptAndResponses(int prompt, int response, int count) {
  Ends end(prompt, prompt + response * count);
  for (int g = 1; g <= count; ++g) end.insert(end.end(), response, prompt + response * g);
  return end;
}

void Grow(Ends& end, std::mt19937& random, int depth, int longest) {
  const size_t first = end.size(), own = 1 + random() % longest;
  end.resize(first + own);
  if (depth > 1) {
    for (int children = random() % 4; children > 0; --children)
      Grow(end, random, depth - 1, longest);
  }
  std::fill_n(end.begin() + first, own, static_cast<int32_t>(end.size()));
}
Ends RandomForest(uint32_t seed, int rows, int depth, int longest) {
  std::mt19937 random(seed);
  Ends end;
  while (static_cast<int>(end.size()) < rows) Grow(end, random, depth, longest);
  return end;
}

ops::TokenBatch BatchOf(const Ends& ends) {
  ops::TokenBatch batch;
  batch.subtree_end = ends;
  batch.tokens.resize(ends.size());
  batch.segments = {{0, static_cast<int32_t>(ends.size()), -1}};
  return batch;
}

// Builds batches whose segments hang below context nodes; blocks are dealt out in a scrambled
// order.
struct ContextBuilder {
  ops::TokenBatch batch;
  int32_t next_block = 0;

  explicit ContextBuilder(int32_t block_tokens) { batch.block_tokens = block_tokens; }
  int32_t Node(int32_t parent, int32_t tokens) {
    batch.context_nodes.push_back(
        {parent, tokens, static_cast<int32_t>(batch.context_blocks.size())});
    for (int32_t t = 0; t < tokens; t += batch.block_tokens)
      batch.context_blocks.push_back(next_block++);
    return static_cast<int32_t>(batch.context_nodes.size()) - 1;
  }
  void Segment(int32_t node, const Ends& ends) {
    const auto begin = static_cast<int32_t>(batch.subtree_end.size());
    for (int32_t end : ends) batch.subtree_end.push_back(begin + end);
    batch.segments.push_back({begin, static_cast<int32_t>(batch.subtree_end.size()), node});
    batch.tokens.resize(batch.subtree_end.size());
  }
  ops::TokenBatch Finish() {
    for (int32_t& block : batch.context_blocks)
      block = static_cast<int32_t>((block * int64_t{7919} + 3) % Prime());
    return batch;
  }
  int32_t Prime() const { return next_block < 1000 ? 1009 : 10007; }
};

double VisiblePairs(const Ends& end) {
  double pairs = 0;
  for (size_t k = 0; k < end.size(); ++k) pairs += end[k] - static_cast<double>(k);
  return pairs;
}

struct Heads {
  int q, kv, dim;
};

// One batch with its data on the device: q, k, v and their gradients are column slices of merged
// buffers.
struct Case {
  Case(const ops::TokenBatch& b, Heads h, AttentionPlanOptions options, uint32_t seed)
      : batch(b),
        heads(h),
        rows(static_cast<int>(b.subtree_end.size())),
        q_width(h.q * h.dim),
        kv_width(h.kv * h.dim),
        qkv_width(q_width + 2 * kv_width),
        out_stride(q_width + 64),
        qkv(size_t(rows) * qkv_width),
        d_qkv(qkv.count),
        out(size_t(rows) * out_stride),
        d_out(size_t(rows) * q_width),
        lse(size_t(rows) * h.q) {
    options.group_size = h.q / h.kv;
    plan = PlanAttention(batch, options);
    words = std::make_unique<Buffer<int32_t>>(plan.words);
    schedule = plan.Bind(words->data);
    FillKernel<<<1024, 256, 0, nullptr>>>(qkv.data, rows, qkv_width, qkv_width, seed);
    FillKernel<<<1024, 256, 0, nullptr>>>(d_out.data, rows, q_width, q_width, seed + 1);
    FillContext(seed + 2);
    scratch_bytes = TreeAttentionScratchBytes(schedule, Shape());
    SetBackwardBudget(0);
  }

  void FillContext(uint32_t seed) {
    std::vector<int32_t> slots, begin(rows), end(rows);
    int32_t max_block = 0;
    for (int32_t block : batch.context_blocks) max_block = std::max(max_block, block);
    num_blocks = batch.context_blocks.empty() ? 0 : max_block + 1;
    for (const ops::Segment& s : batch.segments) {
      const auto first = static_cast<int32_t>(slots.size());
      std::vector<int32_t> chain;
      for (int32_t n = s.context_node; n >= 0; n = batch.context_nodes[n].parent)
        chain.push_back(n);
      for (auto n = chain.rbegin(); n != chain.rend(); ++n) {
        const ops::ContextNode& node = batch.context_nodes[*n];
        for (int32_t t = 0; t < node.num_tokens; ++t) {
          slots.push_back(batch.context_blocks[node.block_begin + t / batch.block_tokens] *
                              batch.block_tokens +
                          t % batch.block_tokens);
        }
      }
      for (int32_t r = s.row_begin; r < s.row_end; ++r)
        begin[r] = first, end[r] = static_cast<int32_t>(slots.size());
    }
    const size_t pool = size_t(num_blocks) * batch.block_tokens * kv_width;
    pages_k = std::make_unique<Buffer<Bf16>>(pool), pages_v = std::make_unique<Buffer<Bf16>>(pool);
    pages_k->Poison(), pages_v->Poison();
    context_slots = std::make_unique<Buffer<int32_t>>(slots);
    context_begin = std::make_unique<Buffer<int32_t>>(begin),
    context_end = std::make_unique<Buffer<int32_t>>(end);
    if (slots.empty()) return;
    const auto n = static_cast<int64_t>(slots.size());
    FillSlotsKernel<<<1024, 256, 0, nullptr>>>(pages_k->data, context_slots->data, n, kv_width,
                                               seed);
    FillSlotsKernel<<<1024, 256, 0, nullptr>>>(pages_v->data, context_slots->data, n, kv_width,
                                               seed + 1);
  }

  // Scratch for dS of as many KV heads; 0: none.
  void StoreDs(int kv_heads) {
    const AttentionShape shape = Shape();
    const int64_t fixed = TreeAttentionBackwardScratchBytes(schedule, shape, 0);
    const int64_t per_head =
        int64_t{schedule.num_images} * (heads.q / heads.kv) * kKeyTile * kBackwardQueryTile * 2;
    SetBackwardBytes(fixed + kv_heads * per_head);
    stored_heads = kv_heads;
  }
  void SetBackwardBudget(int64_t bytes) {
    SetBackwardBytes(TreeAttentionBackwardScratchBytes(schedule, Shape(), bytes));
  }
  void SetBackwardBytes(int64_t bytes) {
    backward_bytes = bytes;
    scratch.reset();
    scratch = std::make_unique<Buffer<char>>(std::max(scratch_bytes, backward_bytes));
  }

  AttentionShape Shape() const {
    return {rows, heads.q, heads.kv, heads.dim, 1.f / std::sqrt(static_cast<float>(heads.dim))};
  }
  RowMatrix Q(Buffer<Bf16>& b) const { return {b.data, qkv_width}; }
  RowMatrix K(Buffer<Bf16>& b) const { return {b.data + q_width, qkv_width}; }
  RowMatrix V(Buffer<Bf16>& b) const { return {b.data + q_width + kv_width, qkv_width}; }
  void Poison() { d_qkv.Poison(), out.Poison(), lse.Poison(), scratch->Poison(); }
  void Forward() {
    TreeAttentionArgs a{Shape(),  schedule,     Q(qkv), K(qkv), V(qkv), {}, {out.data, out_stride},
                        lse.data, scratch->data};
    if (num_blocks > 0) a.context = {pages_k->data, pages_v->data, num_blocks, batch.block_tokens};
    MUST(LaunchTreeAttention(a, nullptr));
  }
  void Backward() {
    const TreeAttentionBackwardArgs a{Shape(),       schedule,
                                      Q(qkv),        K(qkv),
                                      V(qkv),        {out.data, out_stride},
                                      lse.data,      {d_out.data, q_width},
                                      Q(d_qkv),      K(d_qkv),
                                      V(d_qkv),      scratch->data,
                                      backward_bytes};
    MUST(LaunchTreeAttentionBackward(a, nullptr));
  }
  reference::Problem Reference() {
    return {rows,
            heads.q,
            heads.kv,
            heads.dim,
            Shape().scale,
            schedule.subtree_end,
            {qkv.data, qkv_width},
            {qkv.data + q_width, qkv_width},
            {qkv.data + q_width + kv_width, qkv_width},
            {d_out.data, q_width},
            {pages_k->data, kv_width},
            {pages_v->data, kv_width},
            context_slots->data,
            context_begin->data,
            context_end->data};
  }

  ops::TokenBatch batch;
  Heads heads;
  int rows, q_width, kv_width, qkv_width;
  int64_t out_stride;
  Buffer<Bf16> qkv, d_qkv, out, d_out;
  Buffer<float> lse;
  AttentionPlan plan;
  std::unique_ptr<Buffer<int32_t>> words, context_slots, context_begin, context_end;
  std::unique_ptr<Buffer<Bf16>> pages_k, pages_v;
  std::unique_ptr<Buffer<char>> scratch;
  AttentionSchedule schedule;
  int64_t num_blocks = 0, scratch_bytes = 0, backward_bytes = 0;
  int stored_heads = 0;
};

float AsFloat(Bf16 x) { return __bfloat162float(x); }
float AsFloat(float x) { return x; }

// ||out - want|| / ||want|| over sampled rows, columns [column, column + width) of rows at
// `stride`; NaN if any element is. A lone token's d_q and d_k are zero, hence the floor: one
// ten-thousandth of unit-variance elements.
template <typename T>
double RelativeError(const std::vector<T>& out, int64_t stride, int column,
                     const std::vector<float>& want, int width, reference::Sample rows) {
  double difference = 0, norm = 0;
  for (int r = 0; r < rows.count; ++r) {
    for (int i = 0; i < width; ++i) {
      const double w = want[size_t(r) * width + i];
      const double d =
          AsFloat(out[(rows.first + size_t(r) * rows.stride) * stride + column + i]) - w;
      difference += d * d, norm += w * w;
    }
  }
  return std::sqrt(difference / std::max(norm, 1e-8 * rows.count * width));
}

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// The guard columns behind each row of `out` still hold the poison.
bool GuardsIntact(const std::vector<Bf16>& out, int64_t stride, int width) {
  for (size_t i = 0; i < out.size(); ++i) {
    const auto* bits = reinterpret_cast<const uint16_t*>(&out[i]);
    if (static_cast<int64_t>(i) % stride >= width && *bits != 0xFFFF) return false;
  }
  return true;
}

int num_failed = 0, num_checked = 0;

void Report(const std::string& name, const Case& c, const char* mode,
            const std::vector<double>& errors, bool repeats, bool guards) {
  bool good = repeats && guards;
  std::string text;
  for (double e : errors) {
    good = good && e < tolerance::kBf16Attention;
    char number[16];
    std::snprintf(number, sizeof number, " %.1e", e);
    text += number;
  }
  ++num_checked, num_failed += !good;
  std::printf("d%-3d %-26s %-10s rows %6d heads %2d/%d errors%s %s%s%s\n", c.heads.dim,
              name.c_str(), mode, c.rows, c.heads.q, c.heads.kv, text.c_str(),
              repeats ? "repeats" : "DOES NOT REPEAT", guards ? "" : " GUARD OVERWRITTEN",
              good ? "" : "  FAIL");
  std::fflush(stdout);
}

reference::Sample EveryRow(const Case& c) { return {0, 1, c.rows}; }
reference::Sample SixteenRows(const Case& c) {
  const int stride = std::max(1, c.rows / 16);
  return {stride / 3, stride, std::min(16, c.rows)};
}

void CheckForward(const std::string& name, Case& c, const char* mode, reference::Sample rows) {
  c.Poison();
  c.Forward();
  MUST(cudaDeviceSynchronize());
  const auto out = c.out.Host();
  const auto lse = c.lse.Host();
  Buffer<float> want_out(size_t(rows.count) * c.q_width), want_lse(size_t(rows.count) * c.heads.q);
  reference::Problem p = c.Reference();
  p.d_out.data = nullptr;
  reference::QueryRowsKernel<<<dim3(rows.count, c.heads.q), reference::kThreads, 0, nullptr>>>(
      p, rows, want_out.data, want_lse.data, nullptr, nullptr);
  MUST(cudaDeviceSynchronize());
  c.Poison();
  c.Forward();
  MUST(cudaDeviceSynchronize());
  Report(name, c, mode,
         {RelativeError(out, c.out_stride, 0, want_out.Host(), c.q_width, rows),
          RelativeError(lse, c.heads.q, 0, want_lse.Host(), c.heads.q, rows)},
         SameBits(out, c.out.Host()) && SameBits(lse, c.lse.Host()),
         GuardsIntact(out, c.out_stride, c.q_width));
}

// Forward and backward.
void CheckBoth(const std::string& name, Case& c, reference::Sample rows) {
  const bool every_row = rows.count == c.rows;
  c.Poison();
  c.Forward();
  c.Backward();
  MUST(cudaDeviceSynchronize());
  const auto out = c.out.Host(), grads = c.d_qkv.Host();
  const auto lse = c.lse.Host();
  const size_t num_lse = size_t(rows.count) * c.heads.q;
  Buffer<float> want_out(size_t(rows.count) * c.q_width), want_lse(num_lse), want_delta(num_lse),
      want_dq(want_out.count), want_dk(size_t(rows.count) * c.kv_width), want_dv(want_dk.count),
      delta(c.lse.count);
  const reference::Problem p = c.Reference();
  reference::QueryRowsKernel<<<dim3(rows.count, c.heads.q), reference::kThreads, 0, nullptr>>>(
      p, rows, want_out.data, want_lse.data, want_delta.data, want_dq.data);
  if (!every_row) {
    reference::RowDeltaKernel<<<dim3(c.rows, c.heads.q), 1, 0, nullptr>>>(
        p, {c.out.data, c.out_stride}, delta.data);
  }
  reference::KeyRowsKernel<<<dim3(rows.count, c.heads.kv), reference::kThreads, 0, nullptr>>>(
      p, rows, every_row ? want_lse.data : c.lse.data, every_row ? want_delta.data : delta.data,
      want_dk.data, want_dv.data);
  MUST(cudaDeviceSynchronize());
  c.Poison();
  c.Forward();
  c.Backward();
  MUST(cudaDeviceSynchronize());
  const std::string mode =
      c.stored_heads == 0 ? "recompute" : "dS of " + std::to_string(c.stored_heads);
  Report(
      name, c, mode.c_str(),
      {RelativeError(out, c.out_stride, 0, want_out.Host(), c.q_width, rows),
       RelativeError(lse, c.heads.q, 0, want_lse.Host(), c.heads.q, rows),
       RelativeError(grads, c.qkv_width, 0, want_dq.Host(), c.q_width, rows),
       RelativeError(grads, c.qkv_width, c.q_width, want_dk.Host(), c.kv_width, rows),
       RelativeError(grads, c.qkv_width, c.q_width + c.kv_width, want_dv.Host(), c.kv_width, rows)},
      SameBits(out, c.out.Host()) && SameBits(grads, c.d_qkv.Host()) && SameBits(lse, c.lse.Host()),
      GuardsIntact(out, c.out_stride, c.q_width));
}

struct NamedEnds {
  std::string name;
  Ends ends;
  int q_heads, kv_heads;
};

std::vector<NamedEnds> Trees(bool tiny) {
  std::vector<NamedEnds> trees = {{"single token", Causal(1), 2, 1},
                                  {"causal 127", Causal(127), 4, 1},
                                  {"causal 129", Causal(129), 4, 2},
                                  {"forest of short nodes", RandomForest(81, 300, 4, 9), 9, 3}};
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
      {"forest of long nodes", RandomForest(142, 2500, 3, 700), 8, 2}};
  trees.insert(trees.end(), more.begin(), more.end());
  return trees;
}

void CheckTrees(bool tiny) {
  uint32_t seed = 1;
  for (const NamedEnds& t : Trees(tiny)) {
    for (int dim : {64, 128, 256}) {
      const ops::TokenBatch batch = BatchOf(t.ends);
      const Heads heads = {t.q_heads, t.kv_heads, dim};
      Case chunks(batch, heads, {.tiles = false}, seed += 10);
      CheckForward(t.name, chunks, "chunks", EveryRow(chunks));
      if (!HasTileKernels(dim, 90)) continue;
      Case tiles(batch, heads, {.tiles = true}, seed);
      for (int stored_heads : {0, 1, t.kv_heads}) {
        tiles.StoreDs(stored_heads);
        CheckBoth(t.name, tiles, EveryRow(tiles));
      }
    }
  }
}

struct NamedBatch {
  std::string name;
  ops::TokenBatch batch;
};

std::vector<NamedBatch> ContextBatches(int32_t block_tokens, bool tiny) {
  std::vector<NamedBatch> result;
  const auto one = [&](const std::string& name, int32_t context, const Ends& ends) {
    ContextBuilder b(block_tokens);
    b.Segment(b.Node(-1, context), ends);
    result.push_back({name + " bt" + std::to_string(block_tokens), b.Finish()});
  };
  one("ctx 1 + 1", 1, Causal(1));
  one("ctx 127 + 130", 127, Causal(130));
  one("ctx 1025 + 1", 1025, Causal(1));
  {
    ContextBuilder b(block_tokens);  // two levels, decode and prefill side by side
    const int32_t prompt = b.Node(-1, 5 * block_tokens);
    for (int i = 0; i < 3; ++i) b.Segment(b.Node(prompt, 3 + i * block_tokens), Causal(1));
    b.Segment(b.Node(prompt, 77), Causal(200));
    b.Segment(-1, PromptAndResponses(40, 20, 3));
    result.push_back({"mixed bt" + std::to_string(block_tokens), b.Finish()});
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
  return result;
}

void CheckContext(bool tiny) {
  uint32_t seed = 5000;
  for (int32_t block_tokens : {16, 64, 128}) {
    for (const NamedBatch& n : ContextBatches(block_tokens, tiny)) {
      for (const Heads heads : {Heads{9, 3, 64}, Heads{8, 2, 128}, Heads{4, 2, 256}}) {
        Case chunks(n.batch, heads, {.tiles = false}, seed += 10);
        CheckForward(n.name, chunks, "chunks", EveryRow(chunks));
        if (!HasTileKernels(heads.dim, 90)) continue;
        Case both(n.batch, heads, {.tiles = true}, seed);
        CheckForward(n.name, both, "tiles", EveryRow(both));
        Case invariant(n.batch, heads, {.tiles = true, .batch_invariant = true}, seed);
        CheckForward(n.name, invariant, "invariant", EveryRow(invariant));
        Case only_tiles(n.batch, heads, {.tiles = true, .max_decode_rows = 0}, seed);
        CheckForward(n.name, only_tiles, "only tiles", EveryRow(only_tiles));
      }
    }
  }
}

// A row decodes to the same bits alone, in a small group and in a large one, shared or not.
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
  std::vector<Bf16> first;
  for (int samples : {1, 2, 4, 5, 17, 40}) {
    Case c(decode(samples), heads, {.batch_invariant = true}, 99);
    c.Poison();
    c.Forward();
    MUST(cudaDeviceSynchronize());
    auto out = c.out.Host();
    out.resize(c.q_width);
    if (first.empty()) first = out;
    Report("decode row 0 of " + std::to_string(samples), c, "same bits", {}, SameBits(first, out),
           true);
  }
  Case whole(decode(1), heads, {.tiles = false, .max_decode_rows = 0}, 99);
  whole.Poison();
  whole.Forward();
  MUST(cudaDeviceSynchronize());
  auto out = whole.out.Host();
  out.resize(whole.q_width);
  Report("decode row 0 in one item", whole, "same bits", {}, SameBits(first, out), true);
}

void CheckLarge() {
  const auto one = [](const std::string& name, const Ends& ends, int dim) {
    Case c(BatchOf(ends), {32, 8, dim}, {}, 77);
    for (int stored_heads : {0, 3, 8}) {
      c.StoreDs(stored_heads);
      CheckBoth(name, c, SixteenRows(c));
    }
    Case chunks(BatchOf(ends), {32, 8, dim}, {.tiles = false}, 77);
    CheckForward(name, chunks, "chunks", SixteenRows(chunks));
  };
  one("causal 16384", Causal(16384), 64);
  one("causal 16384", Causal(16384), 128);
  one("16384 + 8 x 64", PromptAndResponses(16384, 64, 8), 128);
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

void PrintTime(const char* op, const std::string& name, Heads heads, const char* mode, double ms,
               double flops, double bytes) {
  std::printf(
      "{\"bench\":\"attention\",\"op\":\"%s\",\"shape\":\"%s\",\"heads\":\"%d/"
      "%d\",\"head_dim\":%d,\"mode\":\"%s\","
      "\"clock\":\"sustained\",\"ms\":%.4f,\"tflops\":%.1f,\"gb_per_s\":%.0f}\n",
      op, name.c_str(), heads.q, heads.kv, heads.dim, mode, ms, flops / ms * 1e-9,
      bytes / ms * 1e-6);
  std::fflush(stdout);
}

void TimeTree(const std::string& name, const Ends& ends, Heads heads, bool backward) {
  const double flops = 4.0 * heads.q * heads.dim * VisiblePairs(ends);
  const int repeats = flops > 1e13 ? 7 : 21;
  Case c(BatchOf(ends), heads, {.tiles = HasTileKernels(heads.dim, 90)}, 7);
  PrintTime("forward", name, heads, HasTileKernels(heads.dim, 90) ? "tiles" : "chunks",
            SustainedMs([&] { c.Forward(); }, repeats), flops, 0);
  if (!backward) return;
  for (int64_t budget : {int64_t{0}, int64_t{24} << 30}) {
    c.SetBackwardBudget(budget);
    if (budget > 0 && c.backward_bytes < (1 << 28)) continue;
    c.Forward();
    PrintTime("backward", name, heads, budget == 0 ? "recompute" : "stored dS",
              SustainedMs([&] { c.Backward(); }, repeats), 2.5 * flops, 0);
  }
}

void TimeDecode(int samples, int prompt_tokens, bool shared) {
  constexpr Heads heads = {32, 8, 128};
  ContextBuilder b(128);
  const int32_t prompt = shared ? b.Node(-1, prompt_tokens) : -1;
  for (int i = 0; i < samples; ++i)
    b.Segment(b.Node(prompt, shared ? 33 : prompt_tokens + 33), Causal(1));
  Case c(b.Finish(), heads, {}, 7);
  const double tokens = (shared ? prompt_tokens : samples * double(prompt_tokens)) + 34.0 * samples;
  const double bytes = tokens * heads.kv * heads.dim * 4;
  const std::string name = std::to_string(samples) + " after " + std::to_string(prompt_tokens);
  PrintTime("decode", name, heads, shared ? "grouped" : "each alone",
            SustainedMs([&] { c.Forward(); }, 51),
            4.0 * samples * (prompt_tokens + 34.0) * heads.q * heads.dim, bytes);
}

void TimeDecodes() {
  for (int samples : {1, 8, 32, 64}) {
    TimeDecode(samples, 16384, true);
    if (samples < 32) TimeDecode(samples, 16384, false);
  }
  TimeDecode(512, 1024, true);
}

void TimeTrees() {
  TimeTree("causal 16384", Causal(16384), {32, 8, 128}, true);
  TimeTree("causal 16384", Causal(16384), {32, 8, 64}, true);
  TimeTree("causal 16384", Causal(16384), {16, 4, 256}, false);
  TimeTree("16384 + 8 x 64", PromptAndResponses(16384, 64, 8), {32, 8, 128}, true);
  TimeTree("4096 + 28 x 2048", PromptAndResponses(4096, 2048, 28), {32, 8, 128}, true);
  ContextBuilder b(128);
  b.Segment(b.Node(-1, 14336), Causal(2048));
  Case c(b.Finish(), {32, 8, 128}, {}, 7);
  PrintTime("forward", "2048 over 14336 cached", c.heads, "tiles",
            SustainedMs([&] { c.Forward(); }, 21),
            4.0 * 32 * 128 * (2048.0 * 14336 + VisiblePairs(Causal(2048))), 0);
}

int Main(int count, char** words) {
  const auto asked = [&](const char* word) {
    return std::any_of(words + 1, words + count,
                       [&](const char* w) { return std::strcmp(w, word) == 0; });
  };
  const bool tiny = asked("tiny");
  if (count == 1 || tiny || asked("check")) {
    CheckTrees(tiny);
    CheckContext(tiny);
    CheckDecodeIgnoresTheBatch();
    if (!tiny) CheckLarge();
    std::printf("%d cases, %d failed\n", num_checked, num_failed);
  }
  if (asked("time")) TimeTrees();
  if (asked("time") || asked("decode")) TimeDecodes();
  return num_failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace coppice::cuda

int main(int count, char** words) { return coppice::cuda::Main(count, words); }
