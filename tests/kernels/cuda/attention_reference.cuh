// Plain fp32 attention over a tree mask with context, row by row: the oracle. Written to be
// obviously right, not fast.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/element.cuh"

namespace coppice::cuda::reference {

template <typename E>
struct Rows {
  const E* data;
  int64_t stride;  // elements between rows
};

template <typename E>
struct Problem {
  int rows, q_heads, kv_heads, head_dim;
  float scale;
  const int* subtree_end;
  Rows<E> q, k, v, d_out;
  Rows<E> context_k, context_v;  // by slot
  const int* context_slots;      // row r sees slots [context_begin[r], context_end[r])
  const int *context_begin, *context_end;
};

// Rows first, first + stride, ... are computed; results are stored densely.
struct Sample {
  int first, stride, count;
};

inline constexpr int kThreads = 128;

template <typename E>
__device__ float Dot(const E* a, const E* b, int n) {
  float sum = 0.f;
  for (int d = 0; d < n; ++d) sum += static_cast<float>(a[d]) * static_cast<float>(b[d]);
  return sum;
}

__device__ inline float BlockSum(float x, float* scratch) {
  scratch[threadIdx.x] = x;
  __syncthreads();
  float sum = 0.f;
  for (int i = 0; i < kThreads; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}
__device__ inline float BlockMax(float x, float* scratch) {
  scratch[threadIdx.x] = x;
  __syncthreads();
  float top = scratch[0];
  for (int i = 1; i < kThreads; ++i) top = fmaxf(top, scratch[i]);
  __syncthreads();
  return top;
}

// Candidate j of a row: a context slot, or packed row j - context. Null if the row does not see it.
template <typename E>
struct Keys {
  const Problem<E>& p;
  int row, kv_head;
  __device__ int Context() const { return p.context_end[row] - p.context_begin[row]; }
  __device__ int Count() const { return Context() + row + 1; }
  __device__ const E* At(int j, const Rows<E>& packed, const Rows<E>& pages) const {
    if (j < Context()) {
      return pages.data + p.context_slots[p.context_begin[row] + j] * pages.stride +
             kv_head * p.head_dim;
    }
    const int k = j - Context();
    if (k > row || row >= p.subtree_end[k]) return nullptr;
    return packed.data + k * packed.stride + kv_head * p.head_dim;
  }
  __device__ const E* K(int j) const { return At(j, p.k, p.context_k); }
  __device__ const E* V(int j) const { return At(j, p.v, p.context_v); }
};

// out, lse, and with d_out delta and d_q, of sampled query rows. Grid (rows, query heads).
template <typename E>
__global__ void QueryRowsKernel(Problem<E> p, Sample rows, float* out, float* lse, float* delta,
                                float* d_q) {
  __shared__ float scratch[kThreads], weight[kThreads];
  const int row = rows.first + blockIdx.x * rows.stride, head = blockIdx.y, t = threadIdx.x,
            n = p.head_dim;
  const Keys<E> keys{p, row, head / (p.q_heads / p.kv_heads)};
  const E* q = p.q.data + row * p.q.stride + head * n;
  const int64_t at = int64_t{blockIdx.x} * p.q_heads + head;

  float top = -INFINITY;
  for (int j = t; j < keys.Count(); j += kThreads)
    if (keys.K(j)) top = fmaxf(top, p.scale * Dot(q, keys.K(j), n));
  top = BlockMax(top, scratch);
  float sum = 0.f;
  for (int j = t; j < keys.Count(); j += kThreads)
    if (keys.K(j)) sum += expf(p.scale * Dot(q, keys.K(j), n) - top);
  const float log_sum = top + logf(BlockSum(sum, scratch));

  float output[2] = {}, gradient[2] = {};
  for (int j0 = 0; j0 < keys.Count(); j0 += kThreads) {
    const int j = j0 + t;
    weight[t] =
        j < keys.Count() && keys.K(j) ? expf(p.scale * Dot(q, keys.K(j), n) - log_sum) : 0.f;
    __syncthreads();
    for (int d = t, i = 0; d < n; d += kThreads, ++i)
      for (int u = 0; u < kThreads && j0 + u < keys.Count(); ++u)
        if (keys.V(j0 + u)) output[i] += weight[u] * static_cast<float>(keys.V(j0 + u)[d]);
    __syncthreads();
  }
  for (int d = t, i = 0; d < n; d += kThreads, ++i) out[at * n + d] = output[i];
  if (t == 0) lse[at] = log_sum;
  if (p.d_out.data == nullptr) return;

  const E* d_out = p.d_out.data + row * p.d_out.stride + head * n;
  float product = 0.f;
  for (int d = t, i = 0; d < n; d += kThreads, ++i)
    product += output[i] * static_cast<float>(d_out[d]);
  const float row_delta = BlockSum(product, scratch);
  if (t == 0) delta[at] = row_delta;
  for (int j0 = 0; j0 < keys.Count(); j0 += kThreads) {
    const int j = j0 + t;
    weight[t] = 0.f;
    if (j < keys.Count() && keys.K(j)) {
      const float probability = expf(p.scale * Dot(q, keys.K(j), n) - log_sum);
      weight[t] = probability * (Dot(d_out, keys.V(j), n) - row_delta) * p.scale;
    }
    __syncthreads();
    for (int d = t, i = 0; d < n; d += kThreads, ++i)
      for (int u = 0; u < kThreads && j0 + u < keys.Count(); ++u)
        if (keys.K(j0 + u)) gradient[i] += weight[u] * static_cast<float>(keys.K(j0 + u)[d]);
    __syncthreads();
  }
  for (int d = t, i = 0; d < n; d += kThreads, ++i) d_q[at * n + d] = gradient[i];
}

// delta = rowsum(out * d_out) of every row from a given out. Grid (rows, query heads), one thread.
template <typename E>
__global__ void RowDeltaKernel(Problem<E> p, Rows<E> out, float* delta) {
  const int row = blockIdx.x, head = blockIdx.y, n = p.head_dim;
  delta[int64_t{row} * p.q_heads + head] = Dot(out.data + row * out.stride + head * n,
                                               p.d_out.data + row * p.d_out.stride + head * n, n);
}

// d_k, d_v of one key of one KV head that query rows [begin, end) with sees(row) see, from lse and
// delta of every row.
template <typename E, typename Sees>
__device__ void KeyGradients(const Problem<E>& p, int kv_head, const E* k, const E* v, int begin,
                             int end, Sees sees, const float* lse, const float* delta, float* d_k,
                             float* d_v) {
  __shared__ float weight_k[kThreads], weight_v[kThreads];
  const int t = threadIdx.x, n = p.head_dim, group = p.q_heads / p.kv_heads;
  float grad_k[2] = {}, grad_v[2] = {};
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const auto at = [&](const Rows<E>& x, int r) { return x.data + r * x.stride + head * n; };
    for (int q0 = begin; q0 < end; q0 += kThreads) {
      const int q = q0 + t;
      weight_k[t] = weight_v[t] = 0.f;
      if (q < end && sees(q)) {
        const int64_t i = int64_t{q} * p.q_heads + head;
        weight_v[t] = expf(p.scale * Dot(at(p.q, q), k, n) - lse[i]);
        weight_k[t] = weight_v[t] * (Dot(at(p.d_out, q), v, n) - delta[i]) * p.scale;
      }
      __syncthreads();
      for (int d = t, i = 0; d < n; d += kThreads, ++i)
        for (int u = 0; u < kThreads && q0 + u < end; ++u) {
          grad_k[i] += weight_k[u] * static_cast<float>(at(p.q, q0 + u)[d]);
          grad_v[i] += weight_v[u] * static_cast<float>(at(p.d_out, q0 + u)[d]);
        }
      __syncthreads();
    }
  }
  const int64_t to = (int64_t{blockIdx.x} * p.kv_heads + kv_head) * n;
  for (int d = t, i = 0; d < n; d += kThreads, ++i)
    d_k[to + d] = grad_k[i], d_v[to + d] = grad_v[i];
}

// d_k, d_v of sampled key rows. Grid (rows, kv heads).
template <typename E>
__global__ void KeyRowsKernel(Problem<E> p, Sample rows, const float* lse, const float* delta,
                              float* d_k, float* d_v) {
  const int row = rows.first + blockIdx.x * rows.stride, column = blockIdx.y * p.head_dim;
  KeyGradients(
      p, blockIdx.y, p.k.data + row * p.k.stride + column, p.v.data + row * p.v.stride + column,
      row, p.subtree_end[row], [](int) { return true; }, lse, delta, d_k, d_v);
}

// d_k, d_v of context slots; `sees`: [slots, rows]. Grid (slots, kv heads).
template <typename E>
__global__ void ContextKeysKernel(Problem<E> p, const int* slots, const uint8_t* sees,
                                  const float* lse, const float* delta, float* d_k, float* d_v) {
  const int64_t slot = slots[blockIdx.x];
  const int column = blockIdx.y * p.head_dim;
  const uint8_t* seen_by = sees + int64_t{blockIdx.x} * p.rows;
  KeyGradients(
      p, blockIdx.y, p.context_k.data + slot * p.context_k.stride + column,
      p.context_v.data + slot * p.context_v.stride + column, 0, p.rows,
      [=](int row) { return seen_by[row] != 0; }, lse, delta, d_k, d_v);
}

}  // namespace coppice::cuda::reference
