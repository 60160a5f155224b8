// One attention problem on the device: random q, k, v, pages and d_out, poisoned outputs, forward
// and backward through the launchers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "kernels/cuda/attention/attention_plan.h"
#include "kernels/cuda/attention/tree_attention.h"
#include "tests/kernels/cuda/attention_reference.cuh"

namespace coppice::cuda {

inline void Must(cudaError_t error, const char* what) {
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
  void Poison() { MUST(cudaMemset(data, 0xFF, count * sizeof(T))); }  // NaN in every type
  std::vector<T> Host() const {
    std::vector<T> out(count);
    MUST(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }
};

__device__ inline uint32_t Mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352dU, x ^= x >> 15, x *= 0x846ca68bU, x ^= x >> 16;
  return x;
}
// Roughly normal, unit variance: the sum of four uniforms. Element (i, c) of [n, width] rows at
// `stride`, times `factor`.
template <typename E>
__global__ void FillKernel(E* out, int64_t n, int width, int64_t stride, uint32_t seed,
                           float factor) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n * width;
       i += int64_t{gridDim.x} * blockDim.x) {
    float sum = 0.f;
    for (uint32_t j = 0; j < 4; ++j) {
      sum += Mix(static_cast<uint32_t>(i) * 4 + j + Mix(seed + static_cast<uint32_t>(i >> 30))) *
                 0x1p-32f -
             0.5f;
    }
    out[i / width * stride + i % width] = E(sum * 1.7320508f * factor);
  }
}
// The same for the listed slots of pages.
template <typename E>
__global__ void FillSlotsKernel(E* pages, const int* slots, int64_t n, int width, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n * width;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t at = slots[i / width] * int64_t{width} + i % width;
    const uint32_t x = Mix(static_cast<uint32_t>(at) + Mix(seed));
    pages[at] = E((x * 0x1p-32f - 0.5f) * 3.46f);
  }
}

using Ends = std::vector<int32_t>;

inline Ends Causal(int rows) { return Ends(rows, rows); }

inline Ends PromptAndResponses(int prompt, int response, int count) {
  Ends end(prompt, prompt + response * count);
  for (int g = 1; g <= count; ++g) end.insert(end.end(), response, prompt + response * g);
  return end;
}

inline void Grow(Ends& end, std::mt19937& random, int depth, int longest) {
  const size_t first = end.size(), own = 1 + random() % longest;
  end.resize(first + own);
  if (depth > 1) {
    for (int children = random() % 4; children > 0; --children)
      Grow(end, random, depth - 1, longest);
  }
  std::fill_n(end.begin() + first, own, static_cast<int32_t>(end.size()));
}
inline Ends RandomForest(uint32_t seed, int rows, int depth, int longest) {
  std::mt19937 random(seed);
  Ends end;
  while (static_cast<int>(end.size()) < rows) Grow(end, random, depth, longest);
  return end;
}

inline ops::TokenBatch BatchOf(const Ends& ends) {
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
    int32_t prime = 10007;
    for (const int32_t p : {1009, 257})
      if (next_block <= p) prime = p;
    for (int32_t& block : batch.context_blocks)
      block = static_cast<int32_t>((block * int64_t{7919} + 3) % prime);
    return batch;
  }
};

inline double VisiblePairs(const Ends& end) {
  double pairs = 0;
  for (size_t k = 0; k < end.size(); ++k) pairs += end[k] - static_cast<double>(k);
  return pairs;
}

struct Heads {
  int q, kv, dim;
};

inline constexpr float kPagesBefore = 0.25f;  // what the gradients of context are added to

// One batch with its data on the device: q, k, v and their gradients are column slices of merged
// buffers. d_out has deviation `unit`.
template <typename E>
struct Case {
  Case(const ops::TokenBatch& b, Heads h, AttentionPlanOptions options, uint32_t seed,
       float unit_of_gradients = 1.f)
      : batch(b),
        heads(h),
        unit(unit_of_gradients),
        portable(!options.tiles),
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
    options.group_size = h.q / h.kv, options.kv_heads = h.kv;
    options.stacked = HasStackedKernels(h.dim, 90);
    options.decode_slots = DecodeSlots(h.kv);
    options.backward = true;
    plan = PlanAttention(batch, options);
    words = std::make_unique<Buffer<int32_t>>(plan.words);
    schedule = plan.Bind(words->data);
    FillKernel<<<1024, 256, 0, nullptr>>>(qkv.data, rows, qkv_width, qkv_width, seed, 1.f);
    FillKernel<<<1024, 256, 0, nullptr>>>(d_out.data, rows, q_width, q_width, seed + 1, unit);
    FillContext(seed + 2);
    scratch_bytes = TreeAttentionScratchBytes(schedule, Shape());
    StoreDs(0);
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
    used_slots = slots;
    std::sort(used_slots.begin(), used_slots.end());
    used_slots.erase(std::unique(used_slots.begin(), used_slots.end()), used_slots.end());
    const size_t pool = size_t(num_blocks) * batch.block_tokens * kv_width;
    d_pages_k = std::make_unique<Buffer<float>>(pool);
    d_pages_v = std::make_unique<Buffer<float>>(pool);
    pages_k = std::make_unique<Buffer<E>>(pool), pages_v = std::make_unique<Buffer<E>>(pool);
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

  // Which rows see each of the slots in use: [used slots, rows].
  std::vector<uint8_t> Sees() const {
    const auto slots = context_slots->Host(), begin = context_begin->Host(),
               end = context_end->Host();
    std::vector<uint8_t> sees(used_slots.size() * rows, 0);
    for (int32_t r = 0; r < rows; ++r) {
      for (int32_t i = begin[r]; i < end[r]; ++i) {
        const auto at = std::lower_bound(used_slots.begin(), used_slots.end(), slots[i]);
        sees[(at - used_slots.begin()) * rows + r] = 1;
      }
    }
    return sees;
  }

  // Scratch for dS of as many KV heads; 0: none.
  void StoreDs(int kv_heads) {
    const AttentionShape shape = Shape();
    const int64_t fixed = TreeAttentionBackwardScratchBytes(schedule, shape, 0);
    const int64_t per_head =
        int64_t{schedule.num_images} * (heads.q / heads.kv) * kKeyTile * kBackwardQueryTile * 2;
    stored_heads = kv_heads;
    backward_bytes = fixed + kv_heads * per_head;
    scratch.reset();
    scratch = std::make_unique<Buffer<char>>(std::max(scratch_bytes, backward_bytes));
  }

  AttentionShape Shape() const {
    return {rows,
            heads.q,
            heads.kv,
            heads.dim,
            1.f / std::sqrt(static_cast<float>(heads.dim)),
            kIsF16<E> ? DType::kF16 : DType::kBF16};
  }
  RowMatrix Q(Buffer<E>& b) const { return {b.data, qkv_width}; }
  RowMatrix K(Buffer<E>& b) const { return {b.data + q_width, qkv_width}; }
  RowMatrix V(Buffer<E>& b) const { return {b.data + q_width + kv_width, qkv_width}; }
  void Poison() {
    d_qkv.Poison(), out.Poison(), lse.Poison(), scratch->Poison();
    if (num_blocks == 0) return;
    const std::vector<float> before(d_pages_k->count, kPagesBefore);
    for (const auto* pages : {d_pages_k.get(), d_pages_v.get()}) {
      MUST(cudaMemcpy(pages->data, before.data(), before.size() * sizeof(float),
                      cudaMemcpyHostToDevice));
    }
  }
  ContextPages Pages() const {
    if (num_blocks == 0) return {};
    return {pages_k->data, pages_v->data, num_blocks, batch.block_tokens};
  }
  void Forward() {
    MUST(LaunchTreeAttention({Shape(),
                              schedule,
                              Q(qkv),
                              K(qkv),
                              V(qkv),
                              Pages(),
                              {out.data, out_stride},
                              lse.data,
                              scratch->data},
                             nullptr));
  }
  void Backward() {
    const TreeAttentionBackwardArgs a{Shape(),
                                      schedule,
                                      Q(qkv),
                                      K(qkv),
                                      V(qkv),
                                      Pages(),
                                      {d_pages_k->data, d_pages_v->data},
                                      {out.data, out_stride},
                                      lse.data,
                                      {d_out.data, q_width},
                                      Q(d_qkv),
                                      K(d_qkv),
                                      V(d_qkv),
                                      plan.rounds.data(),
                                      scratch->data,
                                      backward_bytes,
                                      portable};
    MUST(LaunchTreeAttentionBackward(a, nullptr));
  }
  reference::Problem<E> Reference() {
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
  float unit;
  bool portable;  // backward on mma.sync
  int rows, q_width, kv_width, qkv_width;
  int64_t out_stride;
  Buffer<E> qkv, d_qkv, out, d_out;
  Buffer<float> lse;
  AttentionPlan plan;
  std::unique_ptr<Buffer<int32_t>> words, context_slots, context_begin, context_end;
  std::unique_ptr<Buffer<E>> pages_k, pages_v;
  std::unique_ptr<Buffer<float>> d_pages_k, d_pages_v;
  std::vector<int32_t> used_slots;  // ascending
  std::unique_ptr<Buffer<char>> scratch;
  AttentionSchedule schedule;
  int64_t num_blocks = 0, scratch_bytes = 0, backward_bytes = 0;
  int stored_heads = 0;
};

}  // namespace coppice::cuda
