#include "trainer/gradient_scale.h"

#include <algorithm>
#include <cmath>

namespace coppice {
namespace {

constexpr double kLargest = 64;  // of a coefficient times S
constexpr int kMaxExponent = 24;
constexpr int kStepDown = 2;
constexpr int kFiniteNorms = 100;  // before a step up

}  // namespace

void GradientScale::Fix(double largest_coefficient) {
  if (fixed_ || !on_ || !(largest_coefficient > 0)) return;
  const int wanted = static_cast<int>(std::floor(std::log2(kLargest / largest_coefficient)));
  value_ = std::ldexp(1.0, std::clamp(wanted + exponent_, 0, kMaxExponent));
  fixed_ = true;
}

bool GradientScale::Learn(bool finite) {
  if (finite) {
    if (exponent_ < 0 && ++finite_ == kFiniteNorms) {
      ++exponent_;
      finite_ = 0;
    }
    return true;
  }
  finite_ = 0;
  if (value() == 1) return false;
  exponent_ -= kStepDown;
  return true;
}

}  // namespace coppice
