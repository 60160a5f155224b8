// The double-precision reference of every op: plain loops over dense row-major vectors, written
// from the formulas in kernels/ops/params.h and from nothing else. Slow on purpose. Gradients come
// from NumericGradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "kernels/ops/token_batch.h"

namespace coppice::reference {

using Vector = std::vector<double>;

inline double Dot(const Vector& a, const Vector& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// dL/dx[i] of a scalar function by central differences.
inline Vector NumericGradient(const std::function<double(const Vector&)>& loss, Vector x,
                              double step) {
  Vector gradient(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const double old = x[i];
    x[i] = old + step;
    const double above = loss(x);
    x[i] = old - step;
    gradient[i] = (above - loss(x)) / (2 * step);
    x[i] = old;
  }
  return gradient;
}

// op(a) op(b): [m, n]
inline Vector MatMul(const Vector& a, const Vector& b, int64_t m, int64_t n, int64_t k,
                     bool trans_a = false, bool trans_b = false) {
  Vector c(m * n);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < k; ++p) {
        c[i * n + j] += a[trans_a ? p * m + i : i * k + p] * b[trans_b ? j * k + p : p * n + j];
      }
    }
  }
  return c;
}

// x [rows, n], weight [n]
inline Vector RmsNorm(const Vector& x, const Vector& weight, double eps) {
  const size_t n = weight.size();
  Vector out(x.size());
  for (size_t row = 0; row < x.size() / std::max<size_t>(n, 1); ++row) {
    double squares = 0;
    for (size_t i = 0; i < n; ++i) squares += x[row * n + i] * x[row * n + i];
    const double rstd = 1 / std::sqrt(squares / static_cast<double>(n) + eps);
    for (size_t i = 0; i < n; ++i) out[row * n + i] = x[row * n + i] * rstd * weight[i];
  }
  return out;
}

// x [rows, heads, head_dim]; rope [max_positions, head_dim]
inline Vector Rope(const Vector& x, const Vector& rope, const std::vector<int32_t>& positions,
                   int64_t heads, int64_t head_dim) {
  const int64_t half = head_dim / 2;
  Vector out(x.size());
  for (size_t row = 0; row < positions.size(); ++row) {
    const double* table = rope.data() + positions[row] * head_dim;
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t base = (row * heads + h) * head_dim;
      for (int64_t i = 0; i < half; ++i) {
        const double a = x[base + i], b = x[base + half + i];
        out[base + i] = a * table[i] - b * table[half + i];
        out[base + half + i] = b * table[i] + a * table[half + i];
      }
    }
  }
  return out;
}

// gate_up [rows, 2 * ffn] -> [rows, ffn]
inline Vector SwiGlu(const Vector& gate_up, int64_t rows, int64_t ffn) {
  Vector out(rows * ffn);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < ffn; ++i) {
      const double gate = gate_up[r * 2 * ffn + i], up = gate_up[r * 2 * ffn + ffn + i];
      out[r * ffn + i] = gate / (1 + std::exp(-gate)) * up;
    }
  }
  return out;
}

struct AttentionShape {
  int64_t q_heads, kv_heads, head_dim;
};

// Which keys a row sees: packed rows by the mask of token_batch.h, cached tokens by the chain of
// its segment's context node.
struct VisibleKeys {
  std::vector<int64_t> slots;  // of the block pool: block * block_tokens + offset
  std::vector<int64_t> rows;
};

inline VisibleKeys Visible(const ops::TokenBatch& batch, int64_t q) {
  VisibleKeys keys;
  for (const ops::Segment& s : batch.segments) {
    if (q < s.row_begin || q >= s.row_end) continue;
    for (int64_t k = s.row_begin; k <= q; ++k) {
      if (q < batch.subtree_end[k]) keys.rows.push_back(k);
    }
    for (int32_t node = s.context_node; node >= 0; node = batch.context_nodes[node].parent) {
      const ops::ContextNode& n = batch.context_nodes[node];
      for (int32_t i = 0; i < n.num_tokens; ++i) {
        const int64_t block = batch.context_blocks[n.block_begin + i / batch.block_tokens];
        keys.slots.push_back(block * batch.block_tokens + i % batch.block_tokens);
      }
    }
  }
  return keys;
}

struct AttentionInputs {
  Vector q;               // [rows, q_heads, head_dim]
  Vector k, v;            // [rows, kv_heads, head_dim]
  Vector page_k, page_v;  // [slots, kv_heads, head_dim]
};

// out [rows, q_heads, head_dim]; lse [rows, q_heads] if not null.
inline Vector TreeAttention(const ops::TokenBatch& batch, const AttentionInputs& in,
                            const AttentionShape& shape, double scale, Vector* lse = nullptr) {
  const int64_t rows = batch.num_rows(), dim = shape.head_dim;
  Vector out(rows * shape.q_heads * dim);
  if (lse != nullptr) lse->assign(rows * shape.q_heads, 0);
  for (int64_t row = 0; row < rows; ++row) {
    const VisibleKeys visible = Visible(batch, row);
    for (int64_t h = 0; h < shape.q_heads; ++h) {
      const int64_t kv_head = h / (shape.q_heads / shape.kv_heads);
      std::vector<const double*> keys, values;
      for (const int64_t slot : visible.slots) {
        keys.push_back(&in.page_k[(slot * shape.kv_heads + kv_head) * dim]);
        values.push_back(&in.page_v[(slot * shape.kv_heads + kv_head) * dim]);
      }
      for (const int64_t r : visible.rows) {
        keys.push_back(&in.k[(r * shape.kv_heads + kv_head) * dim]);
        values.push_back(&in.v[(r * shape.kv_heads + kv_head) * dim]);
      }
      Vector scores(keys.size());
      for (size_t j = 0; j < keys.size(); ++j) {
        for (int64_t d = 0; d < dim; ++d) {
          scores[j] += scale * in.q[(row * shape.q_heads + h) * dim + d] * keys[j][d];
        }
      }
      const double max = *std::max_element(scores.begin(), scores.end());
      double sum = 0;
      for (const double s : scores) sum += std::exp(s - max);
      for (size_t j = 0; j < keys.size(); ++j) {
        const double p = std::exp(scores[j] - max) / sum;
        for (int64_t d = 0; d < dim; ++d) {
          out[(row * shape.q_heads + h) * dim + d] += p * values[j][d];
        }
      }
      if (lse != nullptr) (*lse)[row * shape.q_heads + h] = max + std::log(sum);
    }
  }
  return out;
}

struct HeadResult {
  Vector logprobs, entropy, lse;
};

// hidden [rows, n], weight [vocab, n]
inline HeadResult LogProbHead(const Vector& hidden, const Vector& weight, int64_t n, int64_t vocab,
                              const std::vector<int32_t>& indptr,
                              const std::vector<int32_t>& targets, double temperature) {
  const int64_t rows = static_cast<int64_t>(indptr.size()) - 1;
  HeadResult result;
  for (int64_t r = 0; r < rows; ++r) {
    Vector z(vocab);
    for (int64_t j = 0; j < vocab; ++j) {
      for (int64_t i = 0; i < n; ++i) z[j] += hidden[r * n + i] * weight[j * n + i] / temperature;
    }
    const double max = *std::max_element(z.begin(), z.end());
    double sum = 0;
    for (const double x : z) sum += std::exp(x - max);
    const double lse = max + std::log(sum);
    double entropy = 0;
    for (const double x : z) entropy -= std::exp(x - lse) * (x - lse);
    result.lse.push_back(lse);
    result.entropy.push_back(entropy);
    for (int32_t t = indptr[r]; t < indptr[r + 1]; ++t) {
      result.logprobs.push_back(z[targets[t]] - lse);
    }
  }
  return result;
}

}  // namespace coppice::reference
