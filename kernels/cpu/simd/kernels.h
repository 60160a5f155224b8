// The inner loops of the CPU ops as a table of functions, compiled once per instruction set and
// chosen at start-up. kernels.cc is the same source for all of them: only the number of lanes of
// its vectors differs (vec.h).
//
// Thread: any; the functions have no state. All pointers are to floats without alignment demands;
// outputs may alias the input of the same element only where said.
#pragma once

#include <cstdint>
#include <vector>

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

// C[i, j] = or += sum over p of A[i, p] B[j, p]: rows of A, B and C lie `*_row` floats apart. Each
// element of C is summed in one order, which depends on k alone: not on m, n or its place.
struct DotGemmArgs {
  int64_t m, n, k;
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool accumulate;
};

// Keys of an attention tile: every tile is this wide, the last one of a path padded with zeros.
inline constexpr int64_t kTileKeys = 64;

// One tile of kTileKeys keys seen by m queries (rows times heads that share a key head). head_dim
// is padded with zeros to `dim`, see PadHeadDim; all buffers are dense. visible[i] of the keys are
// visible to query i; below 1 means none.
struct AttentionForwardTile {
  int64_t m, dim;
  const int32_t* visible;  // [m]
  float scale;
  const float* q;    // [m, dim]
  const float* k_t;  // [dim, kTileKeys]
  const float* v;    // [kTileKeys, dim]
  float* scores;     // [m, kTileKeys] scratch
  float* max;        // [m] in and out: running maximum, from -inf
  float* sum;        // [m] in and out: running sum of exp(score - max), from 0
  float* out;        // [m, dim] in and out: running sum of exp(score - max) v, from 0
};

struct AttentionBackwardTile {
  int64_t m, dim;
  const int32_t* visible;  // [m]; keys [0, visible) are visible
  float scale;
  const float* q;      // [m, dim]
  const float* d_out;  // [m, dim]
  const float* lse;    // [m]
  const float* delta;  // [m]: out . d_out
  const float* k_t;    // [dim, kTileKeys]
  const float* v_t;    // [dim, kTileKeys]
  float* p;            // [m, kTileKeys] scratch
  float* d_s;          // [m, kTileKeys] scratch
  // Either of the two is wanted:
  const float* k;  // [kTileKeys, dim], for d_q
  float* d_q;      // [m, dim] +=, or null
  float* d_k;      // [kTileKeys, dim] +=, or null
  float* d_v;      // [kTileKeys, dim] +=, with d_k
};

struct Kernels {
  const char* name;  // of the instruction set

  void (*dot_gemm)(const DotGemmArgs& args);

  float (*dot)(const float* x, const float* y, int64_t n);

  // Gathers n vectors of head_dim floats, as columns of dst [dim, kTileKeys] or as rows of dst
  // [kTileKeys, dim]; the rest of dst becomes zero.
  void (*pack_columns)(const float* const* vectors, int64_t n, int64_t head_dim, int64_t dim,
                       float* dst);
  void (*pack_rows)(const float* const* vectors, int64_t n, int64_t head_dim, int64_t dim,
                    float* dst);
  void (*attention_forward)(const AttentionForwardTile& tile);
  void (*attention_backward)(const AttentionBackwardTile& tile);

  // dst += src
  void (*add)(const float* src, float* dst, int64_t n);

  // out = x * rstd * weight with rstd = 1 / sqrt(mean(x^2) + eps), which is returned; out may alias
  // x.
  float (*rms_norm)(const float* x, const float* weight, float eps, float* out, int64_t n);
  // With g = d_out * weight:  d_x = rstd * (g - x * rstd^2 * mean(g x)) (+=),  d_weight += d_out *
  // x * rstd,  out = x * rstd * weight unless null. d_x may alias d_out.
  void (*rms_norm_backward)(const float* d_out, const float* x, const float* weight, float rstd,
                            bool accumulate_d_x, float* d_x, float* d_weight, float* out,
                            int64_t n);

  // (a, b) -> (a c - b s, b c + a s) for the halves a, b of x and c = cos_sin[i], s = sign *
  // cos_sin[half + i]. out may alias x.
  void (*rotate_half)(const float* x, const float* cos_sin, float sign, float* out, int64_t half);

  // out = silu(gate) * up
  void (*swiglu)(const float* gate, const float* up, float* out, int64_t n);
  // d_gate and d_up may alias gate and up, out d_out; out may be null.
  void (*swiglu_backward)(const float* gate, const float* up, const float* d_out, float* d_gate,
                          float* d_up, float* out, int64_t n);

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

// head_dim rounded up to what the attention kernels want.
inline int64_t PadHeadDim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// The tables that this processor can run, widest vectors first.
std::vector<const Kernels*> SupportedKernels();

// The first of them; chosen at the first call.
const Kernels& SimdKernels();

}  // namespace coppice::cpu
