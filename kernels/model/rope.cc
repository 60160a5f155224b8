#include "kernels/model/rope.h"

#include <cmath>
#include <numbers>

namespace coppice {
namespace {

// Long wavelengths are divided by `factor`, short ones kept, those between interpolated
// (Llama 3.1).
float Llama3Frequency(const RopeConfig& rope, float frequency) {
  const double context = static_cast<double>(rope.original_max_positions);
  const double wavelength = 2.0 * std::numbers::pi / frequency;
  if (wavelength < context / rope.high_freq_factor) return frequency;
  if (wavelength > context / rope.low_freq_factor) {
    return static_cast<float>(frequency / rope.factor);
  }
  const double smooth = (context / wavelength - rope.low_freq_factor) /
                        (rope.high_freq_factor - rope.low_freq_factor);
  return static_cast<float>((1 - smooth) * frequency / rope.factor + smooth * frequency);
}

}  // namespace

std::vector<float> RopeFrequencies(const RopeConfig& rope, int64_t head_dim) {
  std::vector<float> frequencies(head_dim / 2);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    float w = 1.0f / std::pow(static_cast<float>(rope.theta), exponent);
    if (rope.scaling == RopeConfig::Scaling::kLinear) w /= static_cast<float>(rope.factor);
    if (rope.scaling == RopeConfig::Scaling::kLlama3) w = Llama3Frequency(rope, w);
    frequencies[i] = w;
  }
  return frequencies;
}

std::vector<float> RopeTable(const RopeConfig& rope, int64_t head_dim, int64_t max_positions) {
  const std::vector<float> frequencies = RopeFrequencies(rope, head_dim);
  const int64_t half = head_dim / 2;
  std::vector<float> table(max_positions * head_dim);
  for (int64_t p = 0; p < max_positions; ++p) {
    float* row = table.data() + p * head_dim;
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(p) * frequencies[i];
      row[i] = std::cos(angle);
      row[half + i] = std::sin(angle);
    }
  }
  return table;
}

}  // namespace coppice
