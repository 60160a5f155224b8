// What top-k, top-p and min-p keep of a row, found by radix selection over an order-preserving key:
// four passes over 8 bits each.
#pragma once

#include "kernels/cuda/sampling_slice.cuh"
#include "kernels/ops/params.h"

namespace coppice::cuda {

constexpr float kMassUnit = 1099511627776.0f;  // 2^40

// Larger floats have larger keys.
__device__ inline uint32_t KeyOf(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 is 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ inline float ScoreOf(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// What the filters keep: scores of a larger key, and of those equal to it the first `ties` by id.
struct Kept {
  uint32_t key = 0;
  int64_t ties = INT64_MAX;
  float least_weight = 0;  // min-p

  __device__ bool CutsTies() const { return ties != INT64_MAX; }
  __device__ bool IsAll() const { return key == 0 && least_weight == 0; }
};

struct Weights {
  float max, temperature;
  __device__ float Of(float score) const {
    const float x = score - max;
    return expf(temperature == 1.0f ? x : x / temperature);
  }
};

// Adds each lane's mass to its digit; lanes that share a digit add up first. All lanes of a warp.
__device__ inline void AddShared(Mass* histogram, int digit, Mass mass) {
  constexpr uint32_t kBits = 21;  // a sum of 32 parts fits a word
  const unsigned peers = __match_any_sync(~0u, digit);
  const auto low = static_cast<uint32_t>(mass) & ((1u << kBits) - 1);
  const auto high = static_cast<uint32_t>(mass >> kBits);
  const Mass sum = __reduce_add_sync(peers, low) + (Mass{__reduce_add_sync(peers, high)} << kBits);
  if (sum != 0 && static_cast<int>(threadIdx.x % 32) == __ffs(peers) - 1)
    atomicAdd(&histogram[digit], sum);
}

struct Digit {
  int value;
  Mass above;  // mass of larger keys
};

// The largest digit at which the masses from the top reach `target`, else the least with any. One
// warp.
__device__ inline Digit FindDigit(const Mass* histogram, Mass above, Mass target) {
  constexpr int kEach = kDigits / 32;
  const int lane = threadIdx.x % 32, top = kDigits - 1 - lane * kEach;
  Mass own = 0;
  for (int i = 0; i < kEach; ++i) own += histogram[top - i];
  Mass upto = own;
  for (int d = 1; d < 32; d *= 2) {
    const Mass left = __shfl_up_sync(~0u, upto, d);
    if (lane >= d) upto += left;
  }
  const unsigned reach = __ballot_sync(~0u, own != 0 && above + upto >= target);
  const unsigned some = __ballot_sync(~0u, own != 0);
  const int from = reach != 0 ? __ffs(reach) - 1 : some != 0 ? 31 - __clz(some) : 31;
  Digit found = {top, above + upto - own};
  if (lane == from) {
    for (int i = 0; i < kEach; ++i) {
      const Mass mass = histogram[top - i];
      if (mass == 0) continue;
      found.value = top - i;
      found.above = above + upto - own;
      own -= mass;
      if (above + upto - own >= target) break;
    }
  }
  return {__shfl_sync(~0u, found.value, from), __shfl_sync(~0u, found.above, from)};
}

// Sums the blocks' histograms, each thread for a digit.
template <typename Team>
__device__ inline void GatherHistogram(Slice<Team>& slice, Mass* mine, Mass* sums) {
  slice.Sync();
  for (int i = threadIdx.x; i < kDigits; i += kThreads) {
    Mass sum = 0;
    for (int r = 0; r < Team::kBlocks; ++r) sum += *slice.team.At(&mine[i], r);
    sums[i] = sum;
  }
  __syncthreads();
}

// Selects by weight of the keys above: the largest key such that the mass of `limit.key` and above,
// descending, reaches `target`. measure(score) is the integer mass of one token, below 2^42;
// `above` receives the mass of larger keys.
template <typename Team, typename Measure>
__device__ inline uint32_t SelectKey(Slice<Team>& slice, uint32_t floor_key, Mass target,
                                     const Measure& measure, Mass& above) {
  __shared__ Mass sums[kDigits];
  uint32_t prefix = 0;
  above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    Mass* histogram = slice.told.histogram[slice.turn ^= 1];
    for (int i = threadIdx.x; i < kDigits; i += kThreads) histogram[i] = 0;
    __syncthreads();
    for (int32_t base = 0; base < slice.size; base += kThreads) {
      const int32_t i = base + threadIdx.x;
      const float score = i < slice.size ? slice.scores[i] : 0.0f;
      const uint32_t key = KeyOf(score);
      const bool counts =
          i < slice.size && key >= floor_key && (shift == 24 || key >> (shift + 8) == prefix);
      const int digit = key >> shift & 255;
      const Mass mass = counts ? measure(score) : 0;
      if (shift == 24) {  // scores lie close together: few digits
        AddShared(histogram, digit, mass);
      } else if (mass != 0) {
        atomicAdd(&histogram[digit], mass);
      }
    }
    GatherHistogram(slice, histogram, sums);
    const Digit digit = FindDigit(sums, above, target);
    prefix = prefix << 8 | static_cast<uint32_t>(digit.value);
    above = digit.above;
    __syncthreads();
  }
  return prefix;
}

template <typename Team>
__device__ inline Kept SelectKept(Slice<Team>& slice, const ops::SamplingRow& row,
                                  const Weights& w) {
  Kept kept;
  kept.least_weight = row.min_p;
  if (row.top_k > 0 && row.top_k < slice.vocab) {
    Mass above = 0;
    const auto one = [&w](float score) { return w.Of(score) > 0.0f ? Mass{1} : Mass{0}; };
    kept.key = SelectKey(slice, 0, row.top_k, one, above);
    kept.ties = row.top_k - static_cast<int64_t>(above);
  }
  if (row.top_p >= 1.0f) return kept;
  const auto mass_of = [&w](float score) { return static_cast<Mass>(w.Of(score) * kMassUnit); };
  // Mass above the top-k key, and of the ties that top-k keeps.
  double sum = 0;
  for (int32_t i = threadIdx.x; i < slice.size; i += kThreads) {
    const float score = slice.scores[i];
    if (KeyOf(score) > kept.key) sum += static_cast<double>(mass_of(score));
  }
  const double strict = slice.RowSum(sum);
  const double edge = kept.CutsTies() ? static_cast<double>(mass_of(ScoreOf(kept.key))) : 0.0;
  const double target =
      row.top_p * (strict + (edge > 0 ? edge * static_cast<double>(kept.ties) : 0.0));
  if (target > strict && edge > 0) {  // within the ties
    const int64_t wanted = static_cast<int64_t>(ceil((target - strict) / edge));
    kept.ties = wanted < kept.ties ? wanted : kept.ties;
    return kept;
  }
  Mass above = 0;
  const Mass goal = target < 1.0 ? Mass{1} : static_cast<Mass>(ceil(target));
  kept.key = SelectKey(slice, kept.key + (edge > 0 ? 1 : 0), goal, mass_of, above);
  const double each = static_cast<double>(mass_of(ScoreOf(kept.key)));
  kept.ties = each > 0 ? static_cast<int64_t>(
                             ceil((static_cast<double>(goal) - static_cast<double>(above)) / each))
                       : 1;
  if (kept.ties < 1) kept.ties = 1;
  return kept;
}

}  // namespace coppice::cuda
