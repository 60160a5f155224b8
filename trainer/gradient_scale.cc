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

bool GradientScale::History::Valid() const {
  return exponent <= 0 && exponent >= -kMaxExponent - kStepDown && finite_norms >= 0 &&
         finite_norms < kFiniteNorms;
}

void GradientScale::Fix(double largest_coefficient) {
  if (fixed_ || !on_ || !(largest_coefficient > 0)) return;
  const double wanted = std::floor(std::log2(kLargest / largest_coefficient));
  const double k = std::clamp(wanted, 0.0, double{kMaxExponent});
  value_ = std::exp2(std::max(k + static_cast<double>(history_.exponent), 0.0));
  fixed_ = true;
}

bool GradientScale::Learn(bool finite) {
  if (!on_) return finite;
  if (finite) {
    if (history_.exponent < 0 && ++history_.finite_norms == kFiniteNorms) {
      history_ = {.exponent = history_.exponent + 1};
    }
    return true;
  }
  history_.finite_norms = 0;
  if (value() == 1) return false;
  history_.exponent -= kStepDown;
  return true;
}

}  // namespace coppice
