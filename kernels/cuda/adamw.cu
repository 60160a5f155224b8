// AdamW (Loshchilov & Hutter 2019), bias-corrected, one pass over the flat arena; and the squared
// norm that clipping needs. A bf16 parameter with a 16-bit remainder is an exact f32 master: master
// bits = (param << 16) + signed remainder, the parameter being the master rounded to nearest,
// halves away from zero. Bytes per parameter: 16 in, 12 out (2 + 2 of each are parameter and
// remainder; 14 in with gradients in bf16); bound by memory bandwidth.
#include "kernels/cuda/common.cuh"
#include "kernels/cuda/launchers.h"

namespace coppice::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__device__ Pack<float, 4> LoadFloats(const T* p) {
  const Pack<T, 4> x = Load<T, 4>(p);
  return {{ToFloat(x.v[0]), ToFloat(x.v[1]), ToFloat(x.v[2]), ToFloat(x.v[3])}};
}

template <typename T>
__global__ void SumSquaresKernel(const T* x, int64_t n, double* partials) {
  __shared__ double shared[33];
  const int64_t step = int64_t{gridDim.x} * kThreads * 4, whole = n / 4 * 4;
  const int64_t first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4;
  double sum = 0;
  for (int64_t i = first; i < whole; i += step) {
    const Pack<float, 4> v = LoadFloats(x + i);
    for (int j = 0; j < 4; ++j) sum += static_cast<double>(v.v[j]) * v.v[j];
  }
  if (blockIdx.x == 0 && whole + threadIdx.x < n) {
    const float last = ToFloat(x[whole + threadIdx.x]);
    sum += static_cast<double>(last) * last;
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

template <typename Grad>
__device__ inline float Update(const AdamWArgs<Grad>& a, float decay, float param, float grad,
                               float& m, float& v) {
  const float g = grad * a.grad_scale;
  m = a.beta1 * m + (1.0f - a.beta1) * g;
  v = a.beta2 * v + (1.0f - a.beta2) * g * g;
  return param - (a.step.step_size * m / (sqrtf(v) * a.step.inv_sqrt_v + a.eps) + decay * param);
}

// Parameters as they lie in memory: f32, bf16, or bf16 with its remainder.
struct FloatParams {
  float* param;
  __device__ Pack<float, 4> Read(int64_t i) const { return Load<float, 4>(param + i); }
  __device__ void Write(int64_t i, const Pack<float, 4>& x) const { Store<float, 4>(param + i, x); }
};
struct Bf16Params {
  bf16* param;
  __device__ Pack<float, 4> Read(int64_t i) const { return LoadFloats(param + i); }
  __device__ void Write(int64_t i, const Pack<float, 4>& x) const {
    Pack<bf16, 4> p;
    for (int j = 0; j < 4; ++j) p.v[j] = FromFloat<bf16>(x.v[j]);
    Store<bf16, 4>(param + i, p);
  }
};
struct MasterParams {
  uint16_t* param;
  int16_t* remainder;
  __device__ Pack<float, 4> Read(int64_t i) const {
    const Pack<uint16_t, 4> p = Load<uint16_t, 4>(param + i);
    const Pack<int16_t, 4> r = Load<int16_t, 4>(remainder + i);
    Pack<float, 4> x;
    for (int j = 0; j < 4; ++j) {
      x.v[j] = __uint_as_float((static_cast<uint32_t>(p.v[j]) << 16) +
                               static_cast<uint32_t>(int32_t{r.v[j]}));
    }
    return x;
  }
  __device__ void Write(int64_t i, const Pack<float, 4>& x) const {
    Pack<uint16_t, 4> p;
    Pack<int16_t, 4> r;
    for (int j = 0; j < 4; ++j) {
      const uint32_t bits = __float_as_uint(x.v[j]);
      p.v[j] = static_cast<uint16_t>((bits + 0x8000u) >> 16);
      r.v[j] = static_cast<int16_t>(bits & 0xffffu);
    }
    Store<uint16_t, 4>(param + i, p);
    Store<int16_t, 4>(remainder + i, r);
  }
};

template <typename Params, typename Grad>
__global__ void AdamWKernel(Params params, AdamWArgs<Grad> a) {
  const int64_t step = int64_t{gridDim.x} * kThreads * 4;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * 4; i < a.n; i += step) {
    const float decay = a.decay_mask == nullptr || a.decay_mask[i / 64] ? a.step.decay : 0.0f;
    const Pack<float, 4> g = LoadFloats(a.grad + i);
    Pack<float, 4> x = params.Read(i), m = Load<float, 4>(a.m + i), v = Load<float, 4>(a.v + i);
    for (int j = 0; j < 4; ++j) x.v[j] = Update(a, decay, x.v[j], g.v[j], m.v[j], v.v[j]);
    params.Write(i, x);
    Store<float, 4>(a.m + i, m);
    Store<float, 4>(a.v + i, v);
  }
}

template <typename Params, typename Grad>
void Run(const Params& params, const AdamWArgs<Grad>& args, cudaStream_t stream) {
  const int64_t blocks = CeilDiv(args.n, kThreads * 4);
  AdamWKernel<<<static_cast<unsigned>(blocks < 132 * 16 ? blocks : 132 * 16), kThreads, 0,
                stream>>>(params, args);
}

template <typename Grad>
void RunFor(const ops::AdamWParams& p, const AdamWStep& step, cudaStream_t stream) {
  const AdamWArgs<Grad> args = {p.grad.as<Grad>(), p.m.f32(), p.v.f32(), p.decay_mask.as<uint8_t>(),
                                p.param.shape[0],  p.beta1,   p.beta2,   p.eps,
                                p.grad_scale,      step};
  if (p.param.dtype == DType::kF32) {
    Run(FloatParams{p.param.f32()}, args, stream);
  } else if (p.master_remainder.present()) {
    Run(MasterParams{p.param.as<uint16_t>(), p.master_remainder.as<int16_t>()}, args, stream);
  } else {
    Run(Bf16Params{p.param.as<bf16>()}, args, stream);
  }
}

}  // namespace

cudaError_t LaunchSumSquares(const TensorView& x, double* partials, cudaStream_t stream) {
  const int64_t n = x.shape[0];
  if (x.dtype == DType::kF32) {
    SumSquaresKernel<<<kSumSquaresPartials, kThreads, 0, stream>>>(x.f32(), n, partials);
  } else {
    SumSquaresKernel<<<kSumSquaresPartials, kThreads, 0, stream>>>(x.as<bf16>(), n, partials);
  }
  return cudaGetLastError();
}

cudaError_t LaunchAdamW(const ops::AdamWParams& p, const AdamWStep& step, cudaStream_t stream) {
  if (p.param.shape[0] == 0) return cudaSuccess;
  if (p.grad.dtype == DType::kF32) {
    RunFor<float>(p, step, stream);
  } else {
    RunFor<bf16>(p, step, stream);
  }
  return cudaGetLastError();
}

}  // namespace coppice::cuda
