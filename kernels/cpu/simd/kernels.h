// The inner loops of the CPU ops as a table of functions, compiled once per instruction set and
// chosen at start-up. kernels.cc is the same source for all of them: only the number of lanes of
// its vectors differs (vec.h).
//
// Thread: any; the functions have no state. All pointers are to floats without alignment demands;
// outputs may alias the input of the same element only where said.
#pragma once

#include <cstdint>

namespace coppice::cpu {

// Running softmax statistics of one row of logits z: max, sum of e = exp(z - max), and sum of e *
// (z - max).
struct SoftmaxStats {
  float max;
  float sum;
  float weighted;
};

struct AdamWStep {
  float grad_scale, beta1, beta2, eps;
  float step_size;   // learning_rate / (1 - beta1^t)
  float inv_sqrt_v;  // 1 / sqrt(1 - beta2^t)
  float decay;       // learning_rate * weight_decay
};

// C[i, j] (+)= sum over p of A[i, p] B[p, j]. A is read one value at a time, so any strides do;
// rows of B and C are dense.
struct TileGemmArgs {
  int64_t m, n, k;
  const float* a;
  int64_t a_row, a_col;  // strides of A
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
};

struct Kernels {
  const char* name;  // of the instruction set

  // dst += src
  void (*add)(const float* src, float* dst, int64_t n);

  // out = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), which is returned; out may alias
  // x.
  float (*rms_norm)(const float* x, const float* weight, float eps, float* out, int64_t n);
  // With g = d_out * weight:  d_x = rstd * (g - x * rstd^2 * mean(g x)) (+=),  d_weight += d_out *
  // x * rstd. d_x may alias d_out.
  void (*rms_norm_backward)(const float* d_out, const float* x, const float* weight, float rstd,
                            bool accumulate_d_x, float* d_x, float* d_weight, int64_t n);

  // (a, b) -> (a c - b s, b c + a s) for the halves a, b of x and c = cos_sin[i], s = sign *
  // cos_sin[half + i]. out may alias x.
  void (*rotate_half)(const float* x, const float* cos_sin, float sign, float* out, int64_t half);

  // out = silu(gate) * up
  void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);
  // d_gate and d_up may alias gate and up.
  void (*swiglu_backward)(const float* gate, const float* up, const float* d_out, float* d_gate,
                          float* d_up, int64_t n);

  float (*max)(const float* x, int64_t n);  // -inf when empty
  // out = exp((x - shift) / divisor); out may alias x.
  void (*exp_shifted)(const float* x, float shift, float divisor, float* out, int64_t n);
  // Folds n more logits z = x * scale into `stats`.
  void (*softmax_stats)(const float* x, float scale, SoftmaxStats* stats, int64_t n);
  // x = logits -> d_logits = -scale * p (coef + d_entropy (log p + entropy)), with log p = x *
  // scale - lse.
  void (*softmax_backward)(float* x, float scale, float lse, float entropy, float coef,
                           float d_entropy, int64_t n);

  double (*sum_squares)(const float* x, int64_t n);
  // decay_mask: null = decay all; else one byte for each 64 elements.
  void (*adamw)(const AdamWStep& step, const float* grad, const uint8_t* decay_mask, float* param,
                float* m, float* v, int64_t n);
};

// The table for this processor. The first call chooses.
const Kernels& SimdKernels();

}  // namespace coppice::cpu
