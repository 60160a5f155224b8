#include <cmath>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

DType F32Or(DType other, const TensorView& t) { return t.dtype == other ? other : DType::kF32; }

}  // namespace

// Blocks sum fixed shares in double precision; the host adds them in order.
absl::StatusOr<double> SumSquares(Context& context, TensorView x) {
  RETURN_IF_ERROR(
      ops::ShapeCheck("sum_squares").Tensor("x", x, F32Or(DType::kBF16, x), {x.dim(0)}).status());
  ASSIGN_OR_RETURN(char* scratch,
                   context.Scratch(kSumSquaresPartials * static_cast<int64_t>(sizeof(double))));
  double* partials = reinterpret_cast<double*>(scratch);
  RETURN_IF_ERROR(context.Check(LaunchSumSquares(x, partials, context.stream()), "sum_squares"));
  std::vector<double> host(kSumSquaresPartials);
  RETURN_IF_ERROR(context.Check(cudaMemcpyAsync(host.data(), partials, host.size() * sizeof(double),
                                                cudaMemcpyDeviceToHost, context.stream()),
                                "sum_squares"));
  RETURN_IF_ERROR(context.Synchronize());
  double sum = 0;
  for (const double partial : host) sum += partial;
  return sum;
}

absl::Status AdamW(Context& context, const ops::AdamWParams& p) {
  const int64_t n = p.param.dim(0);
  const DType param = F32Or(context.compute_dtype(), p.param);
  // f16 has gradients of a scale, which f32 holds.
  const DType grad = param == DType::kF16 ? DType::kF32 : F32Or(DType::kBF16, p.grad);
  RETURN_IF_ERROR(ops::ShapeCheck("adamw")
                      .Tensor("param", p.param, param, {n})
                      .Tensor("grad", p.grad, grad, {n})
                      .Tensor("m", p.m, DType::kF32, {n})
                      .Tensor("v", p.v, DType::kF32, {n})
                      .Optional("master_remainder", p.master_remainder, DType::kBF16, {n})
                      .Optional("decay_mask", p.decay_mask, DType::kU8, {n / 64})
                      .That(n % 64 == 0, "param", "a multiple of 64 elements", n)
                      .That(param != DType::kF32 || !p.master_remainder.present(),
                            "master_remainder", "no tensor: param is the master", n)
                      .That(p.step >= 1, "step", "at least 1", p.step)
                      .status());
  const double t = static_cast<double>(p.step);
  const AdamWStep step = {
      .step_size = static_cast<float>(p.learning_rate / (1.0 - std::pow(double{p.beta1}, t))),
      .inv_sqrt_v = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(double{p.beta2}, t))),
      .decay = p.learning_rate * p.weight_decay};
  return context.Check(LaunchAdamW(p, step, context.stream()), "adamw");
}

}  // namespace coppice::cuda
