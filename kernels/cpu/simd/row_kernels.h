// Kernels over one row or one range of elements; what each computes is said in kernels.h. Include
// from kernels.cc only.
#pragma once

#include <cmath>

#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/vec.h"

namespace {

using coppice::cpu::AdamWStep;
using coppice::cpu::SoftmaxStats;

float Dot(const float* x, const float* y, int64_t n) {
  Vec sum = {};
  ForLanes(n, [&](int64_t i, int64_t c) { sum += Load(x + i, c) * Load(y + i, c); });
  return Sum(sum);
}

void Add(const float* src, float* dst, int64_t n) {
  ForLanes(n,
           [&](int64_t i, int64_t c) { Store(dst + i, Load(dst + i, c) + Load(src + i, c), c); });
}

float RmsNorm(const float* x, const float* weight, float eps, float* out, int64_t n) {
  Vec squares = {};
  ForLanes(n, [&](int64_t i, int64_t c) {
    const Vec v = Load(x + i, c);
    squares += v * v;
  });
  const float rstd = 1.0f / std::sqrt(Sum(squares) / static_cast<float>(n) + eps);
  ForLanes(n, [&](int64_t i, int64_t c) {
    Store(out + i, Load(x + i, c) * rstd * Load(weight + i, c), c);
  });
  return rstd;
}

void RmsNormBackward(const float* d_out, const float* x, const float* weight, float rstd,
                     bool accumulate_d_x, float* d_x, float* d_weight, float* out, int64_t n) {
  Vec dots = {};
  ForLanes(n, [&](int64_t i, int64_t c) {
    dots += Load(d_out + i, c) * Load(weight + i, c) * Load(x + i, c);
  });
  const float projection = Sum(dots) / static_cast<float>(n) * rstd * rstd;
  ForLanes(n, [&](int64_t i, int64_t c) {
    const Vec xv = Load(x + i, c), dv = Load(d_out + i, c);
    Store(d_weight + i, Load(d_weight + i, c) + dv * xv * rstd, c);
    Vec d = (dv * Load(weight + i, c) - xv * projection) * rstd;
    if (accumulate_d_x) d += Load(d_x + i, c);
    Store(d_x + i, d, c);
    if (out != nullptr) Store(out + i, xv * rstd * Load(weight + i, c), c);
  });
}

void RotateHalf(const float* x, const float* cos_sin, float sign, float* out, int64_t half) {
  ForLanes(half, [&](int64_t i, int64_t n) {
    const Vec a = Load(x + i, n), b = Load(x + half + i, n);
    const Vec c = Load(cos_sin + i, n), s = Load(cos_sin + half + i, n) * sign;
    Store(out + i, a * c - b * s, n);
    Store(out + half + i, b * c + a * s, n);
  });
}

inline Vec Sigmoid(Vec x) { return 1.0f / (1.0f + Exp(-x)); }

void SwiGlu(const float* gate, const float* up, float* out, int64_t n) {
  ForLanes(n, [&](int64_t i, int64_t c) {
    const Vec g = Load(gate + i, c);
    Store(out + i, g * Sigmoid(g) * Load(up + i, c), c);
  });
}

// silu'(g) = s + g s (1 - s) with s = sigmoid(g)
void SwiGluBackward(const float* gate, const float* up, const float* d_out, float* d_gate,
                    float* d_up, float* out, int64_t n) {
  ForLanes(n, [&](int64_t i, int64_t c) {
    const Vec g = Load(gate + i, c), u = Load(up + i, c), d = Load(d_out + i, c);
    const Vec s = Sigmoid(g);
    if (out != nullptr) Store(out + i, g * s * u, c);
    Store(d_gate + i, d * u * (s + g * s * (1.0f - s)), c);
    Store(d_up + i, d * g * s, c);
  });
}

float MaxOf(const float* x, int64_t n) {
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  Vec best = Set(kMinusInf);
  ForLanes(n, [&](int64_t i, int64_t c) {
    best = Max(best, c == kLanes ? Load(x + i) : FirstLanes(Load(x + i, c), c, kMinusInf));
  });
  return MaxLane(best);
}

void ExpShifted(const float* x, float shift, float divisor, float* out, int64_t n) {
  ForLanes(
      n, [&](int64_t i, int64_t c) { Store(out + i, Exp((Load(x + i, c) - shift) / divisor), c); });
}

void FoldSoftmaxStats(const float* x, float scale, SoftmaxStats* stats, int64_t n) {
  constexpr float kMinusInf = -std::numeric_limits<float>::infinity();
  const float max = MaxOf(x, n) * scale;
  if (max > stats->max) {
    // exp(z - max) of the old terms shrinks by `shrink`, and their z - max by `drop`.
    const float drop = stats->max - max;
    const float shrink = stats->sum > 0 ? std::exp(drop) : 0.0f;
    stats->weighted = stats->sum > 0 ? (stats->weighted + stats->sum * drop) * shrink : 0.0f;
    stats->sum *= shrink;
    stats->max = max;
  }
  if (stats->max == kMinusInf) return;
  Vec sum = {}, weighted = {};
  ForLanes(n, [&](int64_t i, int64_t c) {
    const Vec z = Load(x + i, c) * scale - stats->max;
    Vec e = Exp(z);
    if (c != kLanes) e = FirstLanes(e, c, 0.0f);
    sum += e;
    weighted += e > 0.0f ? e * z : Vec{};
  });
  stats->sum += Sum(sum);
  stats->weighted += Sum(weighted);
}

void SoftmaxBackward(float* x, float scale, float lse, float entropy, float coef, float d_entropy,
                     int64_t n) {
  ForLanes(n, [&](int64_t i, int64_t c) {
    const Vec log_p = Load(x + i, c) * scale - lse;
    const Vec p = Exp(log_p);
    const Vec slope = coef + d_entropy * (log_p + entropy);
    Store(x + i, p > 0.0f ? p * slope * -scale : Vec{}, c);
  });
}

// Four vectors of partial sums in double precision, so that additions need not wait for each other;
// then in order.
double SumOfSquares(const float* x, int64_t n) {
  typedef double Wide __attribute__((vector_size(8 * COPPICE_LANES)));
  Wide squares[4] = {};
  const auto add = [&](Wide& sum, int64_t i, int64_t count) {
    const Wide v = __builtin_convertvector(Load(x + i, count), Wide);
    sum += v * v;
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int64_t j = 0; j < 4; ++j) add(squares[j], i + j * kLanes, kLanes);
  }
  for (; i < n; i += kLanes) add(squares[0], i, n - i < kLanes ? n - i : kLanes);
  const Wide total = (squares[0] + squares[1]) + (squares[2] + squares[3]);
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += total[lane];
  return sum;
}

inline Vec SquareRoot(Vec v) {
  for (int64_t i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

void AdamW(const AdamWStep& s, const float* grad, const uint8_t* decay_mask, float* param, float* m,
           float* v, int64_t n) {
  static_assert(64 % kLanes == 0, "a vector lies in one group of the decay mask");
  ForLanes(n, [&](int64_t i, int64_t c) {
    const bool decayed = decay_mask == nullptr || decay_mask[i / 64] != 0;
    const Vec g = Load(grad + i, c) * s.grad_scale;
    const Vec mi = s.beta1 * Load(m + i, c) + (1.0f - s.beta1) * g;
    const Vec vi = s.beta2 * Load(v + i, c) + (1.0f - s.beta2) * (g * g);
    const Vec w = Load(param + i, c);
    const Vec step = s.step_size * mi / (SquareRoot(vi) * s.inv_sqrt_v + s.eps);
    Store(param + i, w - step - (decayed ? s.decay : 0.0f) * w, c);
    Store(m + i, mi, c);
    Store(v + i, vi, c);
  });
}

}  // namespace
