// Philox4x32-10 against the known answers of Random123 (kat_vectors of the authors' distribution).
#include "kernels/base/rng.h"

#include <gtest/gtest.h>

namespace coppice {
namespace {

void ExpectPhilox(uint64_t key, const uint32_t (&c)[4], const uint32_t (&want)[4]) {
  const Philox4 got = Philox(key, c[0], c[1], c[2], c[3]);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(got.v[i], want[i]) << "word " << i;
}

TEST(PhiloxTest, GivesTheKnownAnswers) {
  ExpectPhilox(0, {0, 0, 0, 0}, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u});
  ExpectPhilox(0xffffffffffffffffu, {0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu},
               {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu});
  ExpectPhilox(0x299f31d0a4093822u, {0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u},
               {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u});
}

TEST(PhiloxTest, UniformNeverTouchesTheEnds) {
  EXPECT_GT(UniformFloat(0), 0.0f);
  EXPECT_LT(UniformFloat(0xffffffffu), 1.0f);
}

TEST(PhiloxTest, SamplesAndPositionsDiffer) {
  EXPECT_NE(SamplingUniform(1, 0, 5), SamplingUniform(1, 1, 5));
  EXPECT_NE(SamplingUniform(1, 0, 5), SamplingUniform(1, 0, 6));
  EXPECT_NE(SamplingUniform(1, 0, 5), SamplingUniform(2, 0, 5));
  EXPECT_EQ(SamplingUniform(1, 0, 5), SamplingUniform(1, 0, 5));
}

}  // namespace
}  // namespace coppice
