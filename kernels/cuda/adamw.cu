// AdamW (Loshchilov & Hutter 2019), bias-corrected, one pass over the flat arena; and the squared
// norm that clipping needs. A 16-bit parameter with a 16-bit remainder is an f32 master
// (ops::AdamWParams has the formulas). Bytes per parameter: 16 in, 12 out (2 + 2 of each are
// parameter and remainder; 14 in with gradients in bf16); bound by memory bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kNormPacks = 4;  // of 4 neighbours, on their way to a thread at once

template <typename T>
__global__ void SumSquaresKernel(const T* x, int64_t n, double* partials) {
  constexpr int64_t kTile = int64_t{kThreads} * 4 * kNormPacks;
  __shared__ double shared[33];
  const int64_t step = int64_t{gridDim.x} * kTile, whole = n / kTile * kTile;
  double sum = 0;
  for (int64_t tile = blockIdx.x * kTile; tile < whole; tile += step) {
    Pack<T, 4> packs[kNormPacks];
#pragma unroll
    for (int k = 0; k < kNormPacks; ++k)
      packs[k] = Load<T, 4>(x + tile + (k * kThreads + threadIdx.x) * 4);
#pragma unroll
    for (int k = 0; k < kNormPacks; ++k) {
      for (const T element : packs[k].v)
        sum += static_cast<double>(ToFloat(element)) * ToFloat(element);
    }
  }
  if (blockIdx.x == 0) {
    for (int64_t i = whole + threadIdx.x; i < n; i += kThreads) {
      sum += static_cast<double>(ToFloat(x[i])) * ToFloat(x[i]);
    }
  }
  sum = BlockSum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <typename Grad>
struct AdamWArgs {
  const Grad* grad;
  float* m;
  float* v;
  const uint8_t* decay_mask;  // null: everything decays
  int64_t n;
  float beta1, beta2, eps, grad_scale;
  AdamWStep step;
};

// What is rounded when is written out: masters of every type take the same steps.
template <typename Grad>
__device__ inline float Update(const AdamWArgs<Grad>& a, float decay, float param, float grad,
                               float& m, float& v) {
  const float g = grad * a.grad_scale;
  m = __fmaf_rn(a.beta1, m, (1.0f - a.beta1) * g);
  v = __fmaf_rn(g, (1.0f - a.beta2) * g, a.beta2 * v);
  const float root = __fmaf_rn(sqrtf(v), a.step.inv_sqrt_v, a.eps);
  return param - __fmaf_rn(decay, param, a.step.step_size * m / root);
}

// 4 parameters as they lie in memory: in one tensor, rounded where that has 16 bits.
template <typename T>
struct PlainParams {
  T* param;
  struct Held {
    Pack<T, 4> x;
    __device__ float Get(int j) const { return ToFloat(x.v[j]); }
    __device__ void Set(int j, float value) { x.v[j] = FromFloat<T>(value); }
  };
  __device__ Held Read(int64_t i) const { return {Load<T, 4>(param + i)}; }
  __device__ void Write(int64_t i, const Held& held) const { Store<T, 4>(param + i, held.x); }
};

// Exponent of an f16 of which one step is 2^(it - 25).
__device__ inline int StepExponent(uint16_t f16) { return max(f16 >> 10 & 31, 1); }
__device__ inline float PowerOfTwo(int exponent) { return __int_as_float((exponent + 127) << 23); }

template <typename E>
__device__ inline float JoinMaster(uint16_t param, int16_t remainder) {
  if constexpr (kIsF16<E>) {
    return __half2float(__ushort_as_half(param)) +
           static_cast<float>(remainder) * PowerOfTwo(StepExponent(param) - 41);
  } else {
    return __uint_as_float((static_cast<uint32_t>(param) << 16) +
                           static_cast<uint32_t>(int32_t{remainder}));
  }
}
template <typename E>
__device__ inline void SplitMaster(float x, uint16_t& param, int16_t& remainder) {
  if constexpr (kIsF16<E>) {
    constexpr float kLargest = 65504;
    x = x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;  // NaN stays
    const F16 nearest = __float2half_rn(x);
    param = __half_as_ushort(nearest);
    const float rest = (x - __half2float(nearest)) * PowerOfTwo(41 - StepExponent(param));
    remainder = static_cast<int16_t>(max(min(__float2int_rn(rest), 32767), -32767));
  } else {
    const uint32_t bits = __float_as_uint(x);
    param = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    remainder = static_cast<int16_t>(bits & 0xffffu);
  }
}

template <typename E>
struct MasterParams {
  uint16_t* param;
  int16_t* remainder;
  struct Held {
    Pack<uint16_t, 4> param;
    Pack<int16_t, 4> remainder;
    __device__ float Get(int j) const { return JoinMaster<E>(param.v[j], remainder.v[j]); }
    __device__ void Set(int j, float x) { SplitMaster<E>(x, param.v[j], remainder.v[j]); }
  };
  __device__ Held Read(int64_t i) const {
    return {Load<uint16_t, 4>(param + i), Load<int16_t, 4>(remainder + i)};
  }
  __device__ void Write(int64_t i, const Held& held) const {
    Store<uint16_t, 4>(param + i, held.param);
    Store<int16_t, 4>(remainder + i, held.remainder);
  }
};

// Blocks start in order and so walk memory together. As many as fit, each taking tile after tile,
// drift apart, which costs 8 %.
template <typename Params, typename Grad>
__global__ void __launch_bounds__(kThreads) AdamWKernel(Params params, AdamWArgs<Grad> a) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  if (i >= a.n) return;
  const uint8_t decays = a.decay_mask == nullptr ? 1 : a.decay_mask[i / 64];
  auto param = params.Read(i);
  const Pack<Grad, 4> grad = Load<Grad, 4>(a.grad + i);
  Pack<float, 4> m = Load<float, 4>(a.m + i), v = Load<float, 4>(a.v + i);
  const float decay = decays ? a.step.decay : 0.0f;
  for (int j = 0; j < 4; ++j)
    param.Set(j, Update(a, decay, param.Get(j), ToFloat(grad.v[j]), m.v[j], v.v[j]));
  params.Write(i, param);
  Store<float, 4>(a.m + i, m);
  Store<float, 4>(a.v + i, v);
}

template <typename Grad, typename Params>
void Run(const Params& params, const ops::AdamWParams& p, const AdamWStep& step,
         cudaStream_t stream) {
  const AdamWArgs<Grad> args = {p.grad.as<Grad>(), p.m.f32(), p.v.f32(), p.decay_mask.as<uint8_t>(),
                                p.param.shape[0],  p.beta1,   p.beta2,   p.eps,
                                p.grad_scale,      step};
  const int64_t blocks = CeilDiv(args.n, int64_t{kThreads} * 4);
  AdamWKernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(params, args);
}

// Gradients in bf16 go with parameters that have its range.
template <typename E, typename Params>
void RunByGradient(const Params& params, const ops::AdamWParams& p, const AdamWStep& step,
                   cudaStream_t stream) {
  if constexpr (!kIsF16<E>) {
    if (p.grad.dtype != DType::kF32) return Run<Bf16>(params, p, step, stream);
  }
  Run<float>(params, p, step, stream);
}

}  // namespace

cudaError_t LaunchSumSquares(const TensorView& x, double* partials, cudaStream_t stream) {
  const int64_t n = x.shape[0];
  if (x.dtype == DType::kF32) {
    SumSquaresKernel<<<kSumSquaresPartials, kThreads, 0, stream>>>(x.f32(), n, partials);
  } else {
    SumSquaresKernel<<<kSumSquaresPartials, kThreads, 0, stream>>>(x.as<Bf16>(), n, partials);
  }
  return cudaGetLastError();
}

cudaError_t LaunchAdamW(const ops::AdamWParams& p, const AdamWStep& step, cudaStream_t stream) {
  if (p.param.shape[0] == 0) return cudaSuccess;
  if (p.param.dtype == DType::kF32) {
    RunByGradient<float>(PlainParams<float>{p.param.f32()}, p, step, stream);
    return cudaGetLastError();
  }
  ForElement(p.param.dtype, [&](auto element) {
    using E = decltype(element);
    if (p.master_remainder.present()) {
      const MasterParams<E> params = {p.param.as<uint16_t>(), p.master_remainder.as<int16_t>()};
      RunByGradient<E>(params, p, step, stream);
    } else {
      RunByGradient<E>(PlainParams<E>{p.param.as<E>()}, p, step, stream);
    }
  });
  return cudaGetLastError();
}

}  // namespace coppice::cuda
