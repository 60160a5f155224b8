// One token per row of logits, one block per row, without sorting. Filters apply in the order logit
// bias, temperature, top-k, top-p, min-p (params.h; kernels/cpu/sampling.cc defines every tie),
// then the first token by id whose cumulative weight exceeds a counter-based uniform number. top-k
// and top-p are selections by radix: four passes over 8 bits of an order-preserving key each narrow
// the key of the last token kept; top-p compares masses in 2^-40 fixed point, so that its integer
// sums are the same in any order. A row is read about 4 times, 8 with top-k, 12 with top-p, mostly
// from L2; bound by one multiprocessor's L2 reads.
#include "kernels/base/rng.h"
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr float kMassUnit = 1099511627776.0f;  // 2^40

// Larger floats have larger keys.
__device__ inline uint32_t KeyOf(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float ScoreOf(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Best {
  float value;
  int32_t id;
};
__device__ inline Best Better(Best a, Best b) {  // the larger; lower id first
  if (a.id < 0 || (b.id >= 0 && (b.value > a.value || (b.value == a.value && b.id < a.id))))
    return b;
  return a;
}
__device__ inline Best BlockBest(Best x) {
  __shared__ Best shared[kWarps + 1];
  for (int d = 16; d > 0; d /= 2) {
    x = Better(x, {__shfl_xor_sync(~0u, x.value, d), __shfl_xor_sync(~0u, x.id, d)});
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) x = Better(x, shared[w]);
    shared[kWarps] = x;
  }
  __syncthreads();
  return shared[kWarps];
}

// The largest score and its lowest id; id -1 if there is none. NaN and +inf win as +inf.
__device__ Best ArgMax(const float* scores, int64_t vocab) {
  Best best = {0, -1};
#pragma unroll 8  // loads in flight: one block must draw on all of its multiprocessor's bandwidth
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
    const float x = isnan(scores[i]) ? INFINITY : scores[i];
    best = Better(best, {x, static_cast<int32_t>(i)});
  }
  return BlockBest(best);
}

__device__ double LogSumExp(const float* logits, int64_t vocab, float max, float temperature) {
  __shared__ double shared[33];
  double sum = 0;
#pragma unroll 8  // as above
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads)
    sum += expf((logits[i] - max) / temperature);
  return static_cast<double>(max) / temperature + log(BlockSum(sum, shared));
}

// What the filters keep: scores of a larger key, and of those equal to it the first `ties` by id.
struct Kept {
  uint32_t key = 0;
  int64_t ties = INT64_MAX;
  float least_weight = 0;  // min-p
};

struct Weights {
  const float* scores;
  float max, temperature;
  __device__ float Of(float score) const { return expf((score - max) / temperature); }
};

// Selects by weight of the keys above: the largest key such that the mass of `limit.key` and above,
// descending, reaches `target`. measure(score) is the integer mass of one token; `above` receives
// the mass of larger keys.
template <typename Measure>
__device__ uint32_t SelectKey(const float* scores, int64_t vocab, uint32_t floor_key,
                              unsigned long long target, const Measure& measure,
                              unsigned long long& above) {
  __shared__ unsigned long long histogram[256];
  __shared__ uint32_t digit_found;
  __shared__ unsigned long long above_found;
  uint32_t prefix = 0;
  above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kThreads) histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
      const uint32_t key = KeyOf(scores[i]);
      if (key < floor_key || (shift < 24 && key >> (shift + 8) != prefix)) continue;
      const unsigned long long mass = measure(scores[i]);
      if (mass != 0) atomicAdd(&histogram[key >> shift & 255], mass);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int digit = 255;
      int last = 0;
      unsigned long long sum = above;
      for (; digit >= 0; --digit) {
        if (histogram[digit] != 0) last = digit;
        if (sum + histogram[digit] >= target && histogram[digit] != 0) break;
        sum += histogram[digit];
      }
      if (digit < 0) {  // rounding: everything is wanted
        digit = last;
        sum -= histogram[last];
      }
      digit_found = digit;
      above_found = sum;
    }
    __syncthreads();
    prefix = prefix << 8 | digit_found;
    above = above_found;
    __syncthreads();
  }
  return prefix;
}

__device__ Kept SelectKept(const ops::SamplingRow& row, const Weights& w, int64_t vocab) {
  __shared__ double shared[33];
  Kept kept;
  kept.least_weight = row.min_p;
  if (row.top_k > 0 && row.top_k < vocab) {
    unsigned long long above = 0;
    const auto one = [&w](float score) { return w.Of(score) > 0.0f ? 1ull : 0ull; };
    kept.key = SelectKey(w.scores, vocab, 0, row.top_k, one, above);
    kept.ties = row.top_k - static_cast<int64_t>(above);
  }
  if (row.top_p >= 1.0f) return kept;
  const auto mass_of = [&w](float score) {
    return static_cast<unsigned long long>(w.Of(score) * kMassUnit);
  };
  // Mass above the top-k key, and of the ties that top-k keeps.
  double sum = 0;
  for (int64_t i = threadIdx.x; i < vocab; i += kThreads) {
    if (KeyOf(w.scores[i]) > kept.key) sum += static_cast<double>(mass_of(w.scores[i]));
  }
  const double strict = BlockSum(sum, shared);
  const double edge =
      kept.ties == INT64_MAX ? 0.0 : static_cast<double>(mass_of(ScoreOf(kept.key)));
  const double target =
      row.top_p * (strict + (edge > 0 ? edge * static_cast<double>(kept.ties) : 0.0));
  if (target > strict && edge > 0) {  // within the ties
    const int64_t wanted = static_cast<int64_t>(ceil((target - strict) / edge));
    kept.ties = wanted < kept.ties ? wanted : kept.ties;
    return kept;
  }
  unsigned long long above = 0;
  const unsigned long long goal =
      target < 1.0 ? 1ull : static_cast<unsigned long long>(ceil(target));
  kept.key = SelectKey(w.scores, vocab, kept.key + (edge > 0 ? 1 : 0), goal, mass_of, above);
  const double each = static_cast<double>(mass_of(ScoreOf(kept.key)));
  kept.ties = each > 0 ? static_cast<int64_t>(
                             ceil((static_cast<double>(goal) - static_cast<double>(above)) / each))
                       : 1;
  if (kept.ties < 1) kept.ties = 1;
  return kept;
}

// Weight of a score that the filters keep, else 0. `rank` counts earlier tokens with the edge key.
__device__ inline float KeptWeight(const Weights& w, const Kept& kept, float score, int64_t rank) {
  const uint32_t key = KeyOf(score);
  if (key < kept.key || (key == kept.key && rank >= kept.ties)) return 0;
  const float weight = w.Of(score);
  return weight >= kept.least_weight ? weight : 0.0f;
}

// Each warp owns a contiguous run of ids; its lanes walk it side by side.
struct Run {
  int64_t begin, end;
};
__device__ inline Run WarpRun(int64_t vocab, int warp) {
  const int64_t size = CeilDiv(CeilDiv(vocab, kWarps), 32) * 32;
  return {min(vocab, warp * size), min(vocab, (warp + 1) * size)};
}

// Calls fn(id, weight) for each 32 ids of the run in step; weights of dropped tokens are 0.
template <typename Fn>
__device__ void WalkRun(const Weights& w, const Kept& kept, Run run, int64_t rank, const Fn& fn) {
  const int lane = threadIdx.x % 32;
  for (int64_t base = run.begin; base < run.end; base += 32) {
    const int64_t id = base + lane;
    const bool inside = id < run.end;
    const float score = inside ? w.scores[id] : 0.0f;
    const unsigned ties = __ballot_sync(~0u, inside && KeyOf(score) == kept.key);
    const int64_t my_rank = rank + __popc(ties & ((1u << lane) - 1));
    if (fn(id, inside ? KeptWeight(w, kept, score, my_rank) : 0.0f)) return;
    rank += __popc(ties);
  }
}

struct Drawn {
  int32_t token;
  float weight;
  double total;
};

__device__ Drawn Draw(const Weights& w, const Kept& kept, int64_t vocab, float u) {
  __shared__ int64_t tie_count[kWarps];
  __shared__ double run_sum[kWarps];
  __shared__ Drawn drawn;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Run run = WarpRun(vocab, warp);
  int64_t ties = 0;
  for (int64_t i = run.begin + lane; i < run.end; i += 32) ties += KeyOf(w.scores[i]) == kept.key;
  ties = WarpSum(ties);
  if (lane == 0) tie_count[warp] = ties;
  __syncthreads();
  int64_t rank = 0;
  for (int i = 0; i < warp; ++i) rank += tie_count[i];
  double sum = 0;
  WalkRun(w, kept, run, rank, [&](int64_t, float weight) {
    sum += weight;
    return false;
  });
  sum = WarpSum(sum);
  if (lane == 0) run_sum[warp] = sum;
  __syncthreads();
  double total = 0, before = 0;
  int chosen = 0;
  for (int i = 0; i < kWarps; ++i) total += run_sum[i];
  const double threshold = u * total;
  double cumulative = 0;
  bool found = false;
  for (int i = 0; i < kWarps;
       ++i) {  // the run in which the sum passes the threshold, else the last with any weight
    if (found || run_sum[i] == 0) continue;
    chosen = i;
    before = cumulative;
    cumulative += run_sum[i];
    found = cumulative > threshold;
  }
  if (warp == chosen) {
    double at = before;
    Drawn last = {0, 0, total};
    WalkRun(w, kept, run, rank, [&](int64_t id, float weight) {
      double inclusive = weight;
      for (int d = 1; d < 32; d *= 2) {
        const double left = __shfl_up_sync(~0u, inclusive, d);
        if (lane >= d) inclusive += left;
      }
      const unsigned some = __ballot_sync(~0u, weight > 0);
      const unsigned past = __ballot_sync(~0u, weight > 0 && at + inclusive > threshold);
      if (some == 0) return false;
      const int from = past != 0 ? __ffs(past) - 1 : 31 - __clz(some);
      last.token = static_cast<int32_t>(__shfl_sync(~0u, id, from));
      last.weight = __shfl_sync(~0u, weight, from);
      at += __shfl_sync(~0u, inclusive, 31);
      return past != 0;
    });
    if (lane == 0) drawn = last;
  }
  __syncthreads();
  return drawn;
}

// The largest raw log-probs, descending, by repeated maximum below the one before.
__device__ void TopLogprobs(const SampleInputs& in, int64_t row, const float* logits, double lse) {
  Best last = {INFINITY, -1};
  for (int32_t t = 0; t < in.top_logprobs; ++t) {
    Best best = {0, -1};
    for (int64_t i = threadIdx.x; i < in.vocab; i += kThreads) {
      const Best x = {logits[i], static_cast<int32_t>(i)};
      if (x.value < last.value || (x.value == last.value && x.id > last.id)) best = Better(best, x);
    }
    best = BlockBest(best);
    if (threadIdx.x == 0) {
      in.top_ids[row * in.top_logprobs + t] = best.id;
      in.top_values[row * in.top_logprobs + t] =
          best.id < 0 ? -INFINITY : static_cast<float>(static_cast<double>(best.value) - lse);
    }
    if (best.id >= 0)
      last = best;
    else
      last = {-INFINITY, INT32_MAX};
  }
}

// Adds the row's biases in order and keeps the raw logits that they cover.
__device__ void ApplyBias(const SampleInputs& in, const ops::SamplingRow& row, float* logits) {
  if (threadIdx.x == 0) {
    for (int32_t b = row.bias_begin; b < row.bias_end; ++b)
      in.raw_values[b] = logits[in.bias_ids[b]];
    for (int32_t b = row.bias_begin; b < row.bias_end; ++b)
      logits[in.bias_ids[b]] += in.bias_values[b];
  }
  __syncthreads();
}
__device__ float RawLogit(const SampleInputs& in, const ops::SamplingRow& row, const float* logits,
                          int32_t token) {
  for (int32_t b = row.bias_begin; b < row.bias_end; ++b) {
    if (in.bias_ids[b] == token) return in.raw_values[b];
  }
  return logits[token];
}

__global__ void __launch_bounds__(kThreads) SampleKernel(SampleInputs in) {
  const ops::SamplingRow row = in.rows[blockIdx.x];
  float* logits = in.logits + blockIdx.x * in.stride;
  SampleOutput out;
  if (threadIdx.x == 0) {
    in.out[blockIdx.x] = out;
    if (in.drawn != nullptr) in.drawn[blockIdx.x] = 0;
  }
  const Best raw_best = ArgMax(logits, in.vocab);
  const float raw_max = raw_best.value;
  if (!isfinite(raw_max)) return;
  const double raw_lse = LogSumExp(logits, in.vocab, raw_max, 1.0f);
  TopLogprobs(in, blockIdx.x, logits, raw_lse);
  const float temperature = row.temperature > 0 ? row.temperature : 1.0f;
  const double tempered_lse =
      temperature == 1.0f ? raw_lse : LogSumExp(logits, in.vocab, raw_max, temperature);
  ApplyBias(in, row, logits);
  const bool biased = row.bias_begin < row.bias_end;
  const Best best = biased ? ArgMax(logits, in.vocab) : raw_best;
  if (!isfinite(best.value)) return;
  out.token = best.id;
  if (row.temperature > 0) {
    const Weights weights = {logits, best.value, row.temperature};
    const Kept kept = SelectKept(row, weights, in.vocab);
    const Drawn drawn =
        Draw(weights, kept, in.vocab, SamplingUniform(row.seed, row.sample, row.position));
    if (!(drawn.total > 0)) return;
    out.token = drawn.token;
    out.sampled = static_cast<float>(log(drawn.weight / drawn.total));
  }
  if (threadIdx.x != 0) return;
  const double logit = RawLogit(in, row, logits, out.token);
  out.raw = static_cast<float>(logit - raw_lse);
  out.tempered = static_cast<float>(logit / temperature - tempered_lse);
  out.drawn = 1;
  in.out[blockIdx.x] = out;
  if (in.drawn != nullptr) in.drawn[blockIdx.x] = out.token;
}

}  // namespace

cudaError_t LaunchSample(const SampleInputs& in, cudaStream_t stream) {
  if (in.n == 0) return cudaSuccess;
  SampleKernel<<<static_cast<unsigned>(in.n), kThreads, 0, stream>>>(in);
  return cudaGetLastError();
}

}  // namespace coppice::cuda
