// Counter-based random numbers: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random
// numbers: as easy as 1, 2, 3", SC'11). The same (key, counter) gives the same numbers whatever the
// thread, batch or device. Safe in .cu files.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define COPPICE_HOST_DEVICE __host__ __device__
#else
#define COPPICE_HOST_DEVICE
#endif

namespace coppice {

struct Philox4 {
  uint32_t v[4];
};

// Ten rounds over counter (c0..c3) with a 64-bit key.
COPPICE_HOST_DEVICE inline Philox4 Philox(uint64_t key, uint32_t c0, uint32_t c1, uint32_t c2,
                                          uint32_t c3) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in (0, 1): 23 bits and a half, which a float holds exactly, so never 0 or 1.
COPPICE_HOST_DEVICE inline float UniformFloat(uint32_t bits) {
  return (static_cast<float>(bits >> 9) + 0.5f) * (1.0f / 8388608.0f);
}

// The uniform number that decides the token at `position` of sample `sample` under `seed`.
COPPICE_HOST_DEVICE inline float SamplingUniform(uint64_t seed, uint32_t sample,
                                                 uint32_t position) {
  return UniformFloat(Philox(seed, position, sample, 0, 0).v[0]);
}

}  // namespace coppice
