// Partial results in 16 bits: what the decode kernel's blocks write for each other, half the bytes
// of f32. A row is rounded to f16 after its base has moved so that its largest magnitude is in
// [1/2, 1): an eighth of bf16's rounding, whatever the range of the values.
//
// The words of a row come in the order in which quads of lanes hold accumulators: word 16 i + 4 q +
// c is columns 32 i + 8 c + 2 q and the next one, so that lane q of a quad writes 16 bytes at once.
#pragma once

#include "kernels/cuda/attention/chunk_attention.cuh"

namespace coppice::cuda {

// What moves a row's sums from base b (log2 units) to b + log2(m), m the power of two above
// `largest`, within 2^-23 and 2^61: sums beyond 2^77 overflow, those below
// 2^-48 are lost.
struct PackedBase {
  float log2, factor;

  __device__ __forceinline__ explicit PackedBase(float largest) {
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - 126;
    const int up = min(max(exponent, -23), 61);
    log2 = static_cast<float>(up);
    factor = __uint_as_float(static_cast<uint32_t>(127 - up) << 23);
  }
};

// A partial result of one row and query head as four lanes have it: lane `quad` of them columns 8 j
// + 2 quad + e. The lanes' numbers differ in quad_bit and the bit above. `part` negative: none.
template <int D>
struct PartialRow {
  int64_t part;
  int quad, quad_bit;

  // All lanes of the warp. at(j, e): the lane's sums, not normalised.
  template <bool kPacked, typename E, typename At>
  __device__ __forceinline__ void Store(const ChunkParameters<E>& p, float base, float sum,
                                        const At& at) const {
    if constexpr (kPacked) {
      StorePacked(p, base, sum, at);
    } else {
      if (part < 0) return;
      float* to = p.partial.out + part * D + 2 * quad;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) *reinterpret_cast<float2*>(to + 8 * j) = {at(j, 0), at(j, 1)};
      if (quad == 0) p.partial.sums[part] = {base, sum};
    }
  }

 private:
  template <typename E, typename At>
  __device__ __forceinline__ void StorePacked(const ChunkParameters<E>& p, float base, float sum,
                                              const At& at) const {
    float largest = 0.f;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      largest = fmaxf(largest, fmaxf(fabsf(at(j, 0)), fabsf(at(j, 1))));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, quad_bit));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2 * quad_bit));
    if (part < 0) return;
    const PackedBase packed(largest);
    auto* to = reinterpret_cast<uint4*>(p.partial.out) + part * (D / 8) + quad;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int c = 0; c < 4; ++c)
        words[c] =
            PackPair<F16>(at(4 * i + c, 0) * packed.factor, at(4 * i + c, 1) * packed.factor);
      __stcg(to + 4 * i, uint4{words[0], words[1], words[2], words[3]});
    }
    if (quad == 0) __stcg(p.partial.sums + part, float2{base + packed.log2, sum * packed.factor});
  }
};

}  // namespace coppice::cuda
