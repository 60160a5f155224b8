// adamw: the gradient norm and the update of all parameters of a geometry, as the optimizer holds
// them (parameters of 16 bits with a remainder where the device computes in those). Bound: their
// bytes at the measured bandwidth of memory.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/model/parameters.h"
#include "tests/bench/bench_model.h"
#include "tests/bench/benches.h"
#include "tests/bench/bounds.h"
#include "tests/bench/measure.h"
#include "tests/support/tolerances.h"

namespace coppice::bench {
namespace {

// Arenas of one optimizer step. The gradients repeat one block of random numbers.
struct Arenas {
  DeviceBuffer param, remainder, grad, m, v, decay_mask;
  ops::AdamWParams params;
  double sum_squares = 0;  // of the gradients

  static absl::StatusOr<Arenas> Create(int64_t n, uint64_t seed, ops::Ops& ops);
};

absl::StatusOr<Arenas> Arenas::Create(int64_t n, uint64_t seed, ops::Ops& ops) {
  const DType dtype = ops.Info().compute_dtype;
  Arenas a;
  ASSIGN_OR_RETURN(a.param, ops.Allocate(n * SizeOf(dtype), "bench parameters"));
  ASSIGN_OR_RETURN(a.grad, ops.Allocate(n * 4, "bench gradients"));
  ASSIGN_OR_RETURN(a.m, ops.Allocate(n * 4, "bench first moment"));
  ASSIGN_OR_RETURN(a.v, ops.Allocate(n * 4, "bench second moment"));
  a.params = {.param = View1D(a.param.data(), dtype, n),
              .grad = View1D(a.grad.data(), DType::kF32, n),
              .m = View1D(a.m.data(), DType::kF32, n),
              .v = View1D(a.v.data(), DType::kF32, n),
              .learning_rate = 1e-6f,
              .weight_decay = 0.1f};
  if (dtype != DType::kF32) {
    ASSIGN_OR_RETURN(a.remainder, ops.Allocate(n * 2, "bench remainder"));
    a.params.master_remainder = View1D(a.remainder.data(), DType::kBF16, n);
  }
  ASSIGN_OR_RETURN(a.decay_mask, ops.Allocate(n / 64, "bench decay mask"));
  a.params.decay_mask = View1D(a.decay_mask.data(), DType::kU8, n / 64);
  const std::vector<uint8_t> decays(n / 64, 1);
  RETURN_IF_ERROR(ops.Upload(decays.data(), a.params.decay_mask));
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> block(std::min<int64_t>(n, int64_t{1} << 24));
  for (float& g : block) g = normal(random);
  for (int64_t i = 0; i < n; i += static_cast<int64_t>(block.size())) {
    const int64_t end = std::min<int64_t>(n, i + static_cast<int64_t>(block.size()));
    RETURN_IF_ERROR(ops.Upload(block.data(), a.params.grad.Rows(i, end)));
    for (int64_t j = 0; j < end - i; ++j) a.sum_squares += double{block[j]} * block[j];
  }
  return a;
}

}  // namespace

absl::Status RunAdamW(const Options& options) {
  ASSIGN_OR_RETURN(const ModelConfig config, NamedGeometry(options.geometry));
  ASSIGN_OR_RETURN(const std::unique_ptr<ops::Ops> ops, OpenDevice(options));
  const int64_t n = NumParameterElements(config);
  ASSIGN_OR_RETURN(Arenas arenas, Arenas::Create(n, options.seed, *ops));
  ASSIGN_OR_RETURN(const double sum, ops->SumSquares(arenas.params.grad));
  RETURN_IF_ERROR(
      Verify("sum of squares", std::abs(sum / arenas.sum_squares - 1), tolerance::kOpForward));

  const Stage norm = [&] { return ops->SumSquares(arenas.params.grad).status(); };
  const Stage update = [&]() -> absl::Status {
    RETURN_IF_ERROR(ops->AdamW(arenas.params));
    ++arenas.params.step;
    return ops->Synchronize();
  };
  ASSIGN_OR_RETURN(const std::vector<double> seconds,
                   MedianSecondsOfStages(options.repeats, {norm, update}));
  ASSIGN_OR_RETURN(const double bandwidth,
                   MemoryBandwidth(*ops, static_cast<int>(options.threads)));
  const double elements = static_cast<double>(n);
  for (const auto& [pass, time, bytes] :
       {std::tuple("norm", seconds[0], 4 * elements), {"update", seconds[1], 28 * elements}}) {
    Print(options, {.bench = "adamw",
                    .seconds = time,
                    .bound_seconds = bytes / bandwidth,
                    .bound = BandwidthBoundName(bandwidth),
                    .device = ops->Info().name,
                    .pass = pass});
  }
  return absl::OkStatus();
}

}  // namespace coppice::bench
