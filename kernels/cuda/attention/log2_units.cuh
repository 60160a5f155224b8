// Softmax runs in log2 units: x log2(e) for x.
#pragma once

namespace coppice::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

}  // namespace coppice::cuda
