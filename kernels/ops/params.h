// One POD of parameters per op. Names of dimensions: shapes.md. "f" below is the compute type of
// the backend: f32 on the CPU; bf16 or f16 on CUDA, sums in f32. "r" is that of a residual stream,
// which every layer adds to: f32. Outputs are overwritten unless a comment says "+=". Gradient
// contract: parameter gradients +=, activation gradients = (unless noted).
// Optional views are absent by default.
#pragma once

#include <cstdint>

#include "kernels/base/tensor_view.h"

namespace coppice::ops {

class BatchPlan;

struct EmbeddingParams {
  TensorView ids;    // [rows] int32, each in [0, vocab)
  TensorView table;  // [vocab, hidden] f
  TensorView out;    // [rows, hidden] r
};
struct EmbeddingBackwardParams {
  TensorView ids;      // [rows] int32
  TensorView d_out;    // [rows, hidden] f
  TensorView d_table;  // [vocab, hidden] f32, +=, rows in ascending order (deterministic)
};

// out[i] = src[indices[i]]
struct GatherRowsParams {
  TensorView src;      // [rows, hidden] f or r
  TensorView indices;  // [n] int32
  TensorView out;      // [n, hidden], type of src
};
// dst[indices[i]] += src[i]; indices are distinct
struct ScatterAddRowsParams {
  TensorView src;      // [n, hidden] f
  TensorView indices;  // [n] int32
  TensorView dst;      // [rows, hidden] f, +=
};

// out = x * rsqrt(mean(x^2) + eps) * weight   (Zhang & Sennrich 2019)
struct RmsNormParams {
  TensorView x;       // [rows, hidden] r
  TensorView weight;  // [hidden] f
  float eps = 0;
  TensorView out;   // [rows, hidden] f, may alias x of the same type
  TensorView rstd;  // optional [rows] f32, for backward
};
struct RmsNormBackwardParams {
  TensorView d_out;             // [rows, hidden] f
  TensorView x;                 // [rows, hidden] r
  TensorView weight;            // [hidden] f
  TensorView rstd;              // [rows] f32
  TensorView d_x;               // [rows, hidden] f
  bool accumulate_d_x = false;  // true: d_x += (the residual branch)
  TensorView d_weight;          // [hidden] f32, +=
  TensorView out;               // optional [rows, hidden] f: the norm's output again, its bits
};

// c = op(a) op(b) (+ bias) (+ addend), with op = transpose where trans_x.  Sums in f32.
struct MatMulParams {
  TensorView a;  // [m, k] f, or [k, m] if trans_a; unit inner stride
  TensorView b;  // [k, n] f, or [n, k] if trans_b; unit inner stride
  bool trans_a = false;
  bool trans_b = false;
  TensorView bias;    // optional [n] f
  TensorView addend;  // optional [m, n], dtype of c; may be c itself (c +=)
  // [m, n] f, or f32 for weight gradients, logits and the residual stream; weight gradients may be
  // bf16 where f is not f16.
  TensorView c;
  // b is a model parameter, which only loads and updates write: it may be read ahead of its turn.
  bool b_is_parameter = false;
};
// c = RmsNorm(x) b^T (+ bias): a projection and the norm before it. With norm.rstd (backward
// follows) norm.out holds the normed rows afterwards; without, its contents are undefined.
struct NormMatMulParams {
  RmsNormParams norm;
  TensorView b;     // [n, hidden] f; unit inner stride; a model parameter (MatMulParams)
  TensorView bias;  // optional [n] f
  TensorView c;     // [rows, n] f
};
// out[j] += sum over rows of x[row, j]: gradient of a bias
struct SumRowsParams {
  TensorView x;    // [rows, n] f
  TensorView out;  // [n] f32, +=
};

// Pages of one layer's keys and values in the block pool.
struct PagedKv {
  TensorView k;  // [blocks, block_tokens, kv_heads, head_dim] f
  TensorView v;  // same
};

// Optional per-head RMSNorm of q and k (Qwen3), rotate-half RoPE (Su et al. 2021) on all head_dim
// columns, and storing of K and V into their slots. q_out/k_out may alias q_in/k_in when no
// backward follows.
struct QkNormRopeParams {
  const BatchPlan* plan = nullptr;  // positions and kv_slots
  TensorView q_in;                  // [rows, q_heads, head_dim] f
  TensorView k_in;                  // [rows, kv_heads, head_dim] f
  TensorView v;                     // [rows, kv_heads, head_dim] f, read only to be stored
  TensorView q_norm;                // optional [head_dim] f
  TensorView k_norm;                // optional [head_dim] f
  float eps = 0;
  // [max_positions, head_dim] f32: row p = [cos(p w_i), i < head_dim / 2 | sin(p w_i)]
  TensorView rope;
  TensorView q_out;  // [rows, q_heads, head_dim] f
  TensorView k_out;  // [rows, kv_heads, head_dim] f
  PagedKv pages;     // optional: where plan.kv_slots >= 0, k_out and v are stored there
};
struct QkNormRopeBackwardParams {
  const BatchPlan* plan = nullptr;
  TensorView d_q_out;  // [rows, q_heads, head_dim] f
  TensorView d_k_out;  // [rows, kv_heads, head_dim] f
  TensorView q_in;     // [rows, q_heads, head_dim] f, needed with norms only
  TensorView k_in;     // [rows, kv_heads, head_dim] f, needed with norms only
  TensorView q_norm;   // optional [head_dim] f
  TensorView k_norm;   // optional [head_dim] f
  float eps = 0;
  TensorView rope;      // as forward
  TensorView d_q_in;    // [rows, q_heads, head_dim] f, may alias d_q_out
  TensorView d_k_in;    // [rows, kv_heads, head_dim] f, may alias d_k_out
  TensorView d_q_norm;  // optional [head_dim] f32, +=
  TensorView d_k_norm;  // optional [head_dim] f32, +=
};

// Softmax attention under the tree mask (token_batch.h): for each row q and query head h, over the
// visible keys out = softmax(scale * q.K^T) V,  lse = log sum exp(scale * q.K^T). Query head h
// reads kv head h / (q_heads / kv_heads).
struct TreeAttentionParams {
  const BatchPlan* plan = nullptr;
  TensorView q;  // [rows, q_heads, head_dim] f
  TensorView k;  // [rows, kv_heads, head_dim] f
  TensorView v;  // [rows, kv_heads, head_dim] f
  // Required if the plan has context nodes. Written before the batch's first op, or an upload lies
  // between: kernels may read it before the op ahead of them has ended.
  PagedKv context;
  float scale = 0;  // > 0
  TensorView out;   // [rows, q_heads, head_dim] f
  TensorView lse;   // optional [rows, q_heads] f32
};
struct TreeAttentionBackwardParams {
  const BatchPlan* plan = nullptr;
  TensorView q, k, v;  // as forward
  PagedKv context;
  float scale = 0;
  TensorView out;     // [rows, q_heads, head_dim] f, of forward
  TensorView lse;     // [rows, q_heads] f32, of forward
  TensorView d_out;   // [rows, q_heads, head_dim] f
  TensorView d_q;     // [rows, q_heads, head_dim] f
  TensorView d_k;     // [rows, kv_heads, head_dim] f
  TensorView d_v;     // [rows, kv_heads, head_dim] f
  PagedKv d_context;  // optional, shaped like context, f32, +=: gradients of cached keys and values
  TensorView workspace;  // optional [bytes] u8: memory to use at will, where the op's own is less
};

// out = silu(gate) * up   (Shazeer 2020)
struct SwiGluParams {
  TensorView gate_up;  // [rows, 2 * ffn] f
  TensorView out;      // [rows, ffn] f
};
// gate_up = a b^T, out = SwiGlu(gate_up)
struct MatMulSwiGluParams {
  TensorView a;              // [rows, hidden] f
  TensorView b;              // [2 * ffn, hidden] f; unit inner stride; a model parameter
  TensorView gate_up;        // [rows, 2 * ffn] f
  TensorView out;            // optional [rows, ffn] f
  bool keep_gate_up = true;  // false: gate_up may keep what it held
};
// The same of RmsNorm(x): the first half of a gated MLP. norm.out and gate_up hold what they are
// named after if there is norm.rstd; without, where there is `out`, their contents are undefined,
// as those of gate_up are without keep_gate_up.
struct NormSwiGluParams {
  RmsNormParams norm;
  TensorView b;        // [2 * ffn, hidden] f; unit inner stride; a model parameter
  TensorView gate_up;  // [rows, 2 * ffn] f
  TensorView out;      // optional [rows, ffn] f
  bool keep_gate_up = true;
};
// The second half of a layer, and the projections of the next:
//   mid = input + attn_out o^T,  output = mid + mlp.out down^T,  next.c = RmsNorm(output) next.b^T
// with mlp.out = SwiGlu(RmsNorm(mid) mlp.b^T), and then QkNormRope(rotate). Weights are model
// parameters (MatMulParams).
struct MlpBlockParams {
  TensorView attn_out;      // [rows, q_dim] f
  TensorView o;             // [hidden, q_dim] f
  TensorView input;         // [rows, hidden] r
  NormSwiGluParams mlp;     // mlp.norm.x is mid: written, may be input
  TensorView down;          // [hidden, ffn] f
  TensorView output;        // [rows, hidden] r, may be mid
  NormMatMulParams next;    // optional (no next.c): next.norm.x is output
  QkNormRopeParams rotate;  // optional (no plan), with next: q_in, k_in and v are columns of next.c
};
struct SwiGluBackwardParams {
  TensorView gate_up;    // [rows, 2 * ffn] f
  TensorView d_out;      // [rows, ffn] f
  TensorView d_gate_up;  // [rows, 2 * ffn] f, may alias gate_up
  TensorView out;        // optional [rows, ffn] f: SwiGlu's own output again; may alias d_out
};
// Of y = SwiGlu(gate_up) b^T:  SwiGluBackward with d_out = d_y b.
struct MatMulSwiGluBackwardParams {
  TensorView d_y;        // [rows, hidden] f
  TensorView b;          // [hidden, ffn] f; unit inner stride; a model parameter
  TensorView gate_up;    // [rows, 2 * ffn] f
  TensorView d_gate_up;  // [rows, 2 * ffn] f, may alias gate_up
  TensorView out;        // [rows, ffn] f: SwiGlu's own output again
};

// The language-model head without ever holding all logits: rows are processed in chunks.
// With z = hidden W^T / temperature:  lse = log sum_j exp(z_j),  logprob[t] = z[target t] - lse,
// entropy = lse - sum_j p_j z_j. A row may have several targets (the last token of a shared node
// predicts the first token of each child).
struct LogProbHeadParams {
  TensorView hidden;         // [head_rows, hidden] f
  TensorView weight;         // [vocab, hidden] f
  TensorView target_indptr;  // [head_rows + 1] int32 (host memory)
  TensorView targets;        // [targets] int32 (host memory)
  float temperature = 1;     // > 0
  TensorView logprobs;       // [targets] f32 (host memory)
  TensorView entropy;        // [head_rows] f32 (host memory)
  TensorView lse;            // [head_rows] f32 (host memory)
  // Optional [bytes] u8: lent until backward, which is given it again, untouched. A device that
  // finds it large enough keeps there what saves backward the product of the logits; the outputs
  // have the same bits.
  TensorView kept;
};
// Second pass: recomputes the chunk's logits, unless forward kept what it needs of them. Given c[t]
// = dL/dlogprob[t] and e[r] = dL/dentropy[r]:
//   dL/dz_j = sum_t c[t] (1[j = target t] - p_j) - e p_j (log p_j + entropy),
// divided by temperature for logits.
struct LogProbHeadBackwardParams {
  TensorView hidden;         // [head_rows, hidden] f
  TensorView weight;         // [vocab, hidden] f
  TensorView target_indptr;  // as forward
  TensorView targets;
  float temperature = 1;
  TensorView lse;         // [head_rows] f32 (host memory), of forward
  TensorView entropy;     // [head_rows] f32 (host memory), of forward
  TensorView d_logprobs;  // [targets] f32 (host memory)
  TensorView d_entropy;   // optional [head_rows] f32 (host memory)
  TensorView d_hidden;    // [head_rows, hidden] f
  TensorView d_weight;    // [vocab, hidden] f32, += or =
  bool accumulate_d_weight = true;
  TensorView kept;  // as lent to forward, for the same rows
};

// What decides one sampled token. Filters apply in the order logit_bias, temperature, top_k, top_p,
// min_p.
struct SamplingRow {
  float temperature = 1;  // 0 = greedy (ties: lowest id)
  int32_t top_k = 0;      // 0 = off
  float top_p = 1;        // (0, 1]
  float min_p = 0;        // [0, 1): drop tokens below min_p * max probability
  uint64_t seed = 0;
  uint32_t sample = 0;    // with seed and position: the counter of base/rng.h SamplingUniform
  uint32_t position = 0;  // position of the token being drawn
  // Its logit biases are SampleParams::bias_{ids,values}[bias_begin, bias_end).
  int32_t bias_begin = 0;
  int32_t bias_end = 0;
};
struct SampleParams {
  TensorView logits;                   // [n, vocab] f32; may be overwritten
  const SamplingRow* rows = nullptr;   // [n] host
  const int32_t* bias_ids = nullptr;   // host
  const float* bias_values = nullptr;  // host
  int32_t top_logprobs = 0;            // 0..20
  // Optional [n] i32 out, device: the tokens again, for what is queued before they are read.
  TensorView drawn;
  int32_t* tokens = nullptr;      // [n] host out
  float* raw_logprobs = nullptr;  // [n] host out: log-softmax of the raw logits at the token
  // [n] host out: of the distribution drawn from (0 when greedy).
  float* sampled_logprobs = nullptr;
  // Optional [n] host out: log-softmax of raw logits / temperature (1 when greedy), before bias and
  // filters: what LogProbHead gives at that temperature.
  float* tempered_logprobs = nullptr;
  int32_t* top_ids = nullptr;   // [n, top_logprobs] host out, by raw log-prob, descending
  float* top_values = nullptr;  // [n, top_logprobs] host out
};

// Decoupled weight decay (Loshchilov & Hutter 2019), bias-corrected; one pass over the flat arena.
//   g = grad * grad_scale; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
//   param -= lr * (m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + weight_decay * param)
struct AdamWParams {
  TensorView param;  // [params] f (f32 master on the CPU; CUDA keeps master_remainder)
  // Optional [params] 16 bits each (as bf16): param and its signed remainder are an f32 master,
  // which takes the step. bf16: master bits = (param << 16) + remainder, exact; param is the master
  // rounded to nearest, halves away from zero. f16: master = param + remainder * step * 2^-16, step
  // = 2^(max(exponent field of param, 1) - 25); param is the master, held within +-65,504, rounded
  // to nearest even, remainder held within +-32,767: exact from 2^-16 on, below to 2^-40.
  TensorView master_remainder;
  TensorView grad;        // [params] f32, or bf16 where param is not f16
  TensorView m;           // [params] f32
  TensorView v;           // [params] f32
  TensorView decay_mask;  // optional [params / 64] u8: 1 = decay this 64-element group (norms and
                          // biases: 0)
  int64_t step = 1;       // t, from 1
  float learning_rate = 0, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0;
  float grad_scale = 1;  // clip factor
};

// Copies whole blocks inside the pool, all layers: pool[:, dst[i]] = pool[:, src[i]].
struct CopyBlocksParams {
  TensorView pool;               // [layers * 2, blocks, block_tokens, kv_dim] f
  const int32_t* src = nullptr;  // [n] host
  const int32_t* dst = nullptr;  // [n] host, distinct, disjoint from src
  int64_t n = 0;
};

}  // namespace coppice::ops
