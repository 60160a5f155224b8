// Cases of attention for the sanitizers: every kernel at every head_dim, over few steps. What makes
// a tool see more is here once: blocks that go from one item of work to the next, rings that wrap,
// ragged tiles, rounds, passes over some of the heads, pages of every kind with NaN in the slots
// that are not in use. Results are only seen to be whole; what they are is checked elsewhere, over
// the same kernels, and by other kernels, which would take a tool longer than those checked.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "tests/kernels/cuda/attention_case.cuh"

namespace coppice::cuda {

inline constexpr int kForwardOnly = -1;

struct SanitizerCase {
  std::string name;
  ops::TokenBatch batch;
  Heads heads;
  AttentionPlanOptions options = {};
  int stored_heads = kForwardOnly;  // backward with dS of as many KV heads, 0: none
};

inline void AddTrees(std::vector<SanitizerCase>& cases, int dim, bool all) {
  const ops::TokenBatch two_tiles = BatchOf(Causal(129));
  cases.push_back({"chunks", BatchOf(Causal(40)), {4, 2, dim}, {.tiles = false}});
  cases.push_back({"portable", two_tiles, {4, 2, dim}, {.tiles = false}, 0});
  for (const int group : {1, 2, 3, 4}) {
    const std::string name = "groups of " + std::to_string(group);
    if (all || group % 3 == 1) cases.push_back({name, two_tiles, {group, 1, dim}, {}, 1});
  }
  cases.push_back({"short nodes", BatchOf(RandomForest(81, 140, 4, 9)), {4, 2, dim}, {}, 0});
  if (!all) return;
  for (const int stored : {0, 1})
    cases.push_back({"many steps", BatchOf(Causal(520)), {2, 1, dim}, {}, stored});
  // More items than multiprocessors.
  const ops::TokenBatch ragged = BatchOf(PromptAndResponses(140, 59, 2));
  cases.push_back({"many items", ragged, {144, 72, dim}, {}, 0});
  cases.push_back({"many items", ragged, {144, 72, dim}, {.round_images = 5}, 40});
}

// Contexts of whole and of ragged tiles, one of them seen from two runs of rows.
inline ops::TokenBatch PrefillOverContext(int32_t block_tokens) {
  ContextBuilder b(block_tokens);
  const int32_t prompt = b.Node(-1, 2 * block_tokens), other = b.Node(-1, 40);
  b.Segment(prompt, Causal(12));
  b.Segment(other, PromptAndResponses(4, 3, 3));
  b.Segment(b.Node(prompt, 9), Causal(130));
  return b.Finish();
}

inline void AddContexts(std::vector<SanitizerCase>& cases, int dim, bool all) {
  const auto one = [&](int32_t block_tokens, AttentionPlanOptions options, int stored) {
    const std::string name = "context in pages of " + std::to_string(block_tokens);
    cases.push_back({name, PrefillOverContext(block_tokens), {4, 2, dim}, options, stored});
  };
  one(16, {}, 0);
  one(128, {}, 2);
  one(16, {.tiles = false}, 0);
  if (!all) return;
  one(8, {}, kForwardOnly);
  one(16, {.round_images = 5}, 1);
  one(128, {.round_images = 5}, 0);
  one(256, {}, 1);
  ContextBuilder b(16);
  b.Segment(b.Node(-1, 253), PromptAndResponses(2, 3, 2));
  cases.push_back({"few rows on tiles", b.Finish(), {3, 1, dim}, {.max_decode_rows = 0}, 1});
}

// As many samples after a shared prompt, with `own` tokens of their own and a few more each.
inline ops::TokenBatch Decode(int samples, int32_t prompt_tokens, int32_t own) {
  ContextBuilder b(64);
  const int32_t prompt = b.Node(-1, prompt_tokens);
  for (int i = 0; i < samples; ++i) b.Segment(b.Node(prompt, own + i % 3), Causal(1));
  return b.Finish();
}

inline void AddDecodes(std::vector<SanitizerCase>& cases, int dim, bool all) {
  const Heads heads = {8, 2, dim};
  cases.push_back({"few samples", Decode(4, 1280, 3), heads});
  cases.push_back({"wide, invariant", Decode(20, 1280, 3), heads, {.batch_invariant = true}});
  cases.push_back({"narrow pairs, invariant", Decode(6, 512, 7), heads, {.batch_invariant = true}});
  if (!all) return;
  cases.push_back({"narrow, invariant", Decode(1, 704, 1), heads, {.batch_invariant = true}});
  cases.push_back({"more rows than an item has", Decode(40, 256, 40), heads});
  cases.push_back({"own keys stacked behind shared ones", Decode(4, 1280, 140), heads});
  ContextBuilder apart(64);  // requests of their own, short beside long: leaves with all their keys
  apart.Segment(apart.Node(-1, 1024), Causal(1));
  apart.Segment(apart.Node(-1, 100), Causal(3));
  cases.push_back({"a short request beside a long one", apart.Finish(), heads});
  ContextBuilder eight(64);
  eight.Segment(eight.Node(-1, 1020), Causal(8));
  const ops::TokenBatch rows = eight.Finish();
  cases.push_back({"eight rows", rows, {16, 2, dim}});
  cases.push_back({"eight rows, invariant", rows, {16, 2, dim}, {.batch_invariant = true}});
  ContextBuilder mixed(16);
  const int32_t prompt = mixed.Node(-1, 80);
  for (int i = 0; i < 3; ++i) mixed.Segment(mixed.Node(prompt, 3 + 16 * i), Causal(1));
  mixed.Segment(mixed.Node(prompt, 77), Causal(20));
  mixed.Segment(-1, PromptAndResponses(40, 20, 3));
  cases.push_back({"beside prefill", mixed.Finish(), heads});
}

// All cases, or just so many that each kernel runs: for a second type, to the same code.
inline std::vector<SanitizerCase> SanitizerCases(bool all) {
  std::vector<SanitizerCase> cases;
  for (const int dim : {64, 128, 256}) {
    AddTrees(cases, dim, all);
    AddContexts(cases, dim, all);
    AddDecodes(cases, dim, all);
  }
  return cases;
}

// Rows of `stride` hold numbers in their first `width` columns, and behind them what poison left.
template <typename T>
bool IsWhole(const std::vector<T>& rows, int64_t stride, int64_t width) {
  for (size_t i = 0; i < rows.size(); ++i) {
    const bool is_ours = static_cast<int64_t>(i) % stride < width;
    if (std::isfinite(static_cast<float>(rows[i])) != is_ours) return false;
  }
  return true;
}

// Gradients were added to the slots in use alone.
template <typename E>
bool ArePagesWhole(const Case<E>& c, std::vector<float> pages) {
  for (const int32_t slot : c.used_slots) {
    for (int i = 0; i < c.kv_width; ++i) {
      float& value = pages[size_t(slot) * c.kv_width + i];
      if (!std::isfinite(value)) return false;
      value = kPagesBefore;
    }
  }
  return std::all_of(pages.begin(), pages.end(), [](float x) { return x == kPagesBefore; });
}

// Runs the case; a decode twice, the second time on what the first left of its counters.
template <typename E>
bool RunSanitizerCase(const SanitizerCase& s) {
  Case<E> c(s.batch, s.heads, s.options, 31);
  if (s.stored_heads > 0) c.StoreDs(s.stored_heads);
  c.Poison();
  c.Forward();
  if (s.stored_heads == kForwardOnly) {
    c.Forward();
  } else {
    c.Backward();
  }
  MUST(cudaDeviceSynchronize());
  const bool forward =
      IsWhole(c.out.Host(), c.out_stride, c.q_width) && IsWhole(c.lse.Host(), c.heads.q, c.heads.q);
  if (s.stored_heads == kForwardOnly) return forward;
  const bool backward = IsWhole(c.d_qkv.Host(), c.qkv_width, c.qkv_width);
  if (c.num_blocks == 0) return forward && backward;
  return forward && backward && ArePagesWhole(c, c.d_pages_k->Host()) &&
         ArePagesWhole(c, c.d_pages_v->Host());
}

}  // namespace coppice::cuda
