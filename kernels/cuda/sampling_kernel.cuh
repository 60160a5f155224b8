// One token per row of logits, without sorting. Filters apply in the order logit bias, temperature,
// top-k, top-p, min-p (params.h; kernels/cpu/sampling.cc defines every tie), then the first token
// by id whose cumulative weight exceeds a counter-based uniform number. top-k and top-p are
// selections by radix: four passes over 8 bits of an order-preserving key each narrow the key of
// the last token kept; top-p compares masses in 2^-40 fixed point, so that its integer sums are the
// same in any order. A team of blocks takes a row: each keeps a slice of it, in shared memory if it
// fits, and passes over that, about 4 times, 8 with top-k, 12 with top-p; what they find they tell
// each other. Sums run in an order that depends on the vocabulary and the team alone. Traffic: 4
// bytes a logit, once where slices are in shared memory.
#pragma once

#include "kernels/base/rng.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/sampling_filters.cuh"
#include "kernels/cuda/sampling_slice.cuh"

namespace coppice::cuda {

// The largest score and its lowest id, of a thread whose ids ascend; id -1 if all are -inf. NaN and
// +inf win as +inf.
constexpr Best kNoBest = {-INFINITY, -1};
__device__ inline void KeepBest(Best& best, float score, int32_t id) {
  const float x = isnan(score) ? INFINITY : score;
  if (x > best.value) best = {x, id};
}
template <typename Team>
__device__ Best ArgMax(Slice<Team>& slice) {
  Best best = kNoBest;
#pragma unroll 4
  for (int32_t i = threadIdx.x; i < slice.size; i += kThreads)
    KeepBest(best, slice.scores[i], slice.begin + i);
  return slice.RowBest(best);
}

// Exponents are 0 or less: where __expf is off by more than rounding, little is added.
template <typename Team>
__device__ double LogSumExp(Slice<Team>& slice, float max, float temperature) {
  const bool divides = temperature != 1.0f;
  double sum = 0;
#pragma unroll 4
  for (int32_t i = threadIdx.x; i < slice.size; i += kThreads) {
    const float x = slice.scores[i] - max;
    sum += __expf(divides ? x / temperature : x);
  }
  return static_cast<double>(max) / temperature + log(slice.RowSum(sum));
}

// Weight of a score that the filters keep, else 0. `rank` counts earlier tokens with the edge key;
// it is only known where the filters cut ties.
__device__ inline float KeptWeight(const Weights& w, const Kept& kept, float score, int64_t rank) {
  if (kept.IsAll()) return w.Of(score);
  const uint32_t key = KeyOf(score);
  if (key < kept.key || (key == kept.key && rank >= kept.ties)) return 0;
  const float weight = w.Of(score);
  return weight >= kept.least_weight ? weight : 0.0f;
}

// A run of ids of the slice, [begin, end) counted from its first, and the tokens with the edge key
// before it, counted where the filters cut ties.
struct TokenRun {
  int32_t begin, end;
  int64_t ties_before = 0;
};

// Each warp owns a run of its block's slice; its lanes walk it side by side.
template <typename Team>
__device__ inline TokenRun WarpRun(const Slice<Team>& slice) {
  const auto warp = static_cast<int32_t>(threadIdx.x / 32);
  return {min(slice.size, warp * slice.run), min(slice.size, (warp + 1) * slice.run)};
}

// This lane's share of the sum of the kept weights of the run.
template <typename Team>
__device__ double SumRun(const Slice<Team>& slice, const Weights& w, const Kept& kept,
                         TokenRun run) {
  const int lane = threadIdx.x % 32;
  double sum = 0;
#pragma unroll 4
  for (int32_t base = run.begin; base < run.end; base += 32) {
    const int32_t i = base + lane;
    const bool inside = i < run.end;
    const float score = inside ? slice.scores[i] : 0.0f;
    int64_t rank = run.ties_before;
    if (kept.CutsTies()) {
      const unsigned ties = __ballot_sync(~0u, inside && KeyOf(score) == kept.key);
      rank += __popc(ties & ((1u << lane) - 1));
      run.ties_before += __popc(ties);
    }
    if (inside) sum += KeptWeight(w, kept, score, rank);
  }
  return sum;
}

template <typename Team>
__device__ inline int32_t CountTies(const Slice<Team>& slice, const Kept& kept, int32_t begin,
                                    int32_t end, int32_t step) {
  int32_t ties = 0;
  for (int32_t i = begin; i < end; i += step) ties += KeyOf(slice.scores[i]) == kept.key;
  return ties;
}

// Tokens with the edge key before the warp's run.
template <typename Team>
__device__ int64_t TiesBefore(Slice<Team>& slice, const Kept& kept, TokenRun run) {
  __shared__ int32_t of_warp[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t ties = WarpSum(CountTies(slice, kept, run.begin + lane, run.end, 32));
  if (lane == 0) of_warp[warp] = ties;
  __syncthreads();
  int32_t before = 0, all = 0;
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) before = all;
    all += of_warp[i];
  }
  const int32_t* counts = slice.Tell(slice.told.count, all);
  for (int r = 0; r < slice.rank; ++r) before += counts[r];
  return before;
}

struct Found {
  int which = 0;
  double before = 0;  // sum of the weights of those in front of it
};
// The first of `sums`, added up from `before` on, at which they exceed the threshold, else the last
// with any weight.
__device__ inline Found PassThreshold(const double* sums, int count, double before,
                                      double threshold) {
  Found found;
  for (int i = 0; i < count; ++i) {
    if (sums[i] == 0) continue;
    found = {i, before};
    before += sums[i];
    if (before > threshold) break;
  }
  return found;
}

struct Drawn {
  int32_t token;
  float weight;
  double total;
  bool is_here;  // in this block's slice; the others have the total alone
};

template <typename T>
__device__ inline T ScanLanes(T x) {  // sum of this lane's and those before
  const int lane = threadIdx.x % 32;
  for (int d = 1; d < 32; d *= 2) {
    const T left = __shfl_up_sync(~0u, x, d);
    if (lane >= d) x += left;
  }
  return x;
}

// Walks ids one by one: the token at which the kept weights, added up from `at` on, exceed the
// threshold, else the last with any. `at` ends as the sum.
template <typename Team>
__device__ Drawn WalkRun(const Slice<Team>& slice, const Weights& w, const Kept& kept, TokenRun run,
                         double& at, double threshold) {
  Drawn last = {0, 0, 0, true};
  for (int32_t i = run.begin; i < run.end; ++i) {
    const float score = slice.scores[i];
    const float weight = KeptWeight(w, kept, score, run.ties_before);
    run.ties_before += KeyOf(score) == kept.key;
    if (weight == 0) continue;
    last.token = slice.begin + i;
    last.weight = weight;
    at += weight;
    if (at > threshold) break;
  }
  return last;
}

// The same for the whole run of a warp: each lane adds up its part of it, then the lane walks in
// which the threshold lies. The result is in every lane.
template <typename Team>
__device__ Drawn DrawFromRun(const Slice<Team>& slice, const Weights& w, const Kept& kept,
                             TokenRun run, double at, double threshold) {
  const int lane = threadIdx.x % 32;
  const auto share = static_cast<int32_t>(CeilDiv(run.end - run.begin, 32));
  TokenRun part = {min(run.begin + lane * share, run.end),
                   min(run.begin + (lane + 1) * share, run.end), run.ties_before};
  if (kept.CutsTies()) {
    const int32_t ties = CountTies(slice, kept, part.begin, part.end, 1);
    part.ties_before += ScanLanes(ties) - ties;
  }
  double sum = 0;
  WalkRun(slice, w, kept, part, sum, INFINITY);
  const double upto = at + ScanLanes(sum);
  const unsigned some = __ballot_sync(~0u, sum > 0);
  const unsigned past = __ballot_sync(~0u, sum > 0 && upto > threshold);
  const int from = past != 0 ? __ffs(past) - 1 : some != 0 ? 31 - __clz(some) : 0;
  double before = upto - sum;
  Drawn found = {0, 0, 0, true};
  if (lane == from) found = WalkRun(slice, w, kept, part, before, threshold);
  found.token = __shfl_sync(~0u, found.token, from);
  found.weight = __shfl_sync(~0u, found.weight, from);
  return found;
}

template <typename Team>
__device__ Drawn Draw(Slice<Team>& slice, const Weights& w, const Kept& kept, float u) {
  __shared__ double run_sum[kWarps];
  __shared__ Drawn drawn;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  TokenRun run = WarpRun(slice);
  if (kept.CutsTies()) run.ties_before = TiesBefore(slice, kept, run);
  const double sum = WarpSum(SumRun(slice, w, kept, run));
  if (lane == 0) run_sum[warp] = sum;
  __syncthreads();
  double mine = 0, total = 0;
  for (int i = 0; i < kWarps; ++i) mine += run_sum[i];
  const double* sums = slice.Tell(slice.told.sum, mine);
  for (int r = 0; r < Team::kBlocks; ++r) total += sums[r];
  const double threshold = u * total;
  const Found block = PassThreshold(sums, Team::kBlocks, 0, threshold);
  if (block.which != slice.rank) return {0, 0, total, false};
  const Found chosen = PassThreshold(run_sum, kWarps, block.before, threshold);
  if (warp == chosen.which) {
    const Drawn found = DrawFromRun(slice, w, kept, run, chosen.before, threshold);
    if (lane == 0) drawn = found;
  }
  __syncthreads();
  return {drawn.token, drawn.weight, total, true};
}

// The largest raw log-probs, descending, by repeated maximum below the one before.
template <typename Team>
__device__ void TopLogprobs(const SampleInputs& in, int64_t row, Slice<Team>& slice, double lse) {
  Best last = {INFINITY, -1};
  for (int32_t t = 0; t < in.top_logprobs; ++t) {
    Best best = {0, -1};
    for (int32_t i = threadIdx.x; i < slice.size; i += kThreads) {
      const Best x = {slice.scores[i], slice.begin + i};
      if (x.value < last.value || (x.value == last.value && x.id > last.id)) best = Better(best, x);
    }
    best = slice.RowBest(best);
    if (slice.rank == 0 && threadIdx.x == 0) {
      in.top_ids[row * in.top_logprobs + t] = best.id;
      in.top_values[row * in.top_logprobs + t] =
          best.id < 0 ? -INFINITY : static_cast<float>(static_cast<double>(best.value) - lse);
    }
    last = best.id >= 0 ? best : Best{-INFINITY, INT32_MAX};
  }
}

// Adds the row's biases in order and keeps the raw logits that they cover.
template <typename Team>
__device__ void ApplyBias(const SampleInputs& in, const ops::SamplingRow& row, Slice<Team>& slice) {
  if (threadIdx.x == 0) {
    for (int32_t b = row.bias_begin; b < row.bias_end; ++b) {
      if (slice.Has(in.bias_ids[b])) in.raw_values[b] = slice.scores[in.bias_ids[b] - slice.begin];
    }
    for (int32_t b = row.bias_begin; b < row.bias_end; ++b) {
      if (slice.Has(in.bias_ids[b]))
        slice.scores[in.bias_ids[b] - slice.begin] += in.bias_values[b];
    }
  }
  __syncthreads();
}
template <typename Team>
__device__ float RawLogit(const SampleInputs& in, const ops::SamplingRow& row,
                          const Slice<Team>& slice, int32_t token) {
  for (int32_t b = row.bias_begin; b < row.bias_end; ++b) {
    if (in.bias_ids[b] == token) return in.raw_values[b];
  }
  return slice.scores[token - slice.begin];
}

// Ids of a warp, the same for every row.
template <typename Team>
__host__ __device__ int32_t RunOf(int64_t vocab) {
  return static_cast<int32_t>(CeilDiv(CeilDiv(vocab, Team::kBlocks * kWarps), 32) * 32);
}

// This block's slice, staged in shared memory if there is room for it, and the row's maximum.
template <typename Team>
__device__ Best LoadSlice(const float* logits, bool stages, Slice<Team>& slice) {
  constexpr int kAtOnce = 8;  // loads in flight
  Best best = kNoBest;
  for (int32_t base = threadIdx.x; base < slice.size; base += kAtOnce * kThreads) {
    float scores[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t i = base + j * kThreads;
      scores[j] = i < slice.size ? __ldg(logits + slice.begin + i) : -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int32_t i = base + j * kThreads;
      if (i >= slice.size) break;
      if (stages) slice.scores[i] = scores[j];
      KeepBest(best, scores[j], slice.begin + i);
    }
  }
  slice.Sync();  // all blocks are here, and may be told things
  return slice.RowBest(best);
}

// What a row shows from which nothing is drawn.
__device__ inline void WriteNothing(const SampleInputs& in, int64_t row) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  if (thread < in.top_logprobs) {
    in.top_ids[row * in.top_logprobs + thread] = 0;
    in.top_values[row * in.top_logprobs + thread] = 0;
  }
  if (thread != 0) return;
  in.out[row] = SampleOutput();
  if (in.drawn != nullptr) in.drawn[row] = 0;
}

template <typename Team>
__global__ void __launch_bounds__(kThreads, 2) SampleKernel(SampleInputs in, bool stages) {
  extern __shared__ float staged[];
  __shared__ Told<Team> told;
  const Team team;
  const int64_t row_idx = blockIdx.x / Team::kBlocks;
  const ops::SamplingRow row = in.rows[row_idx];
  float* logits = in.logits + row_idx * in.stride;
  const int rank = team.Rank();
  const auto vocab = static_cast<int32_t>(in.vocab);
  const int32_t run = RunOf<Team>(vocab), begin = min(vocab, rank * kWarps * run);
  const int32_t size = min(vocab - begin, kWarps * run);
  Slice<Team> slice = {stages ? staged : logits + begin, begin, size, vocab, run, told, team, rank};
  if (rank == 0) WriteNothing(in, row_idx);
  SampleOutput out;
  const Best raw_best = LoadSlice(logits, stages, slice);
  const float raw_max = raw_best.value;
  if (!isfinite(raw_max)) return;
  const double raw_lse = LogSumExp(slice, raw_max, 1.0f);
  TopLogprobs(in, row_idx, slice, raw_lse);
  const float temperature = row.temperature > 0 ? row.temperature : 1.0f;
  const double tempered_lse =
      temperature == 1.0f ? raw_lse : LogSumExp(slice, raw_max, temperature);
  ApplyBias(in, row, slice);
  const bool biased = row.bias_begin < row.bias_end;
  const Best best = biased ? ArgMax(slice) : raw_best;
  if (!isfinite(best.value)) return;
  out.token = best.id;
  bool is_here = slice.Has(best.id);
  if (row.temperature > 0) {
    const Weights weights = {best.value, row.temperature};
    const Kept kept = SelectKept(slice, row, weights);
    const Drawn drawn =
        Draw(slice, weights, kept, SamplingUniform(row.seed, row.sample, row.position));
    if (!(drawn.total > 0)) return;
    is_here = drawn.is_here;
    out.token = drawn.token;
    out.sampled = static_cast<float>(log(drawn.weight / drawn.total));
  }
  if (!is_here || threadIdx.x != 0) return;
  const double logit = RawLogit(in, row, slice, out.token);
  out.raw = static_cast<float>(logit - raw_lse);
  out.tempered = static_cast<float>(logit / temperature - tempered_lse);
  out.drawn = 1;
  in.out[row_idx] = out;
  if (in.drawn != nullptr) in.drawn[row_idx] = out.token;
}

}  // namespace coppice::cuda
