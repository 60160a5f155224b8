#include "tests/bench/bounds.h"

#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <functional>
#include <random>

#include "absl/strings/str_format.h"
#include "kernels/base/status_macros.h"
#include "kernels/model/parameters.h"
#include "tests/bench/measure.h"
#include "tests/bench/random_tensor.h"

namespace coppice::bench {
namespace {

// The machine is warm from the timed runs, but a GPU's power limit takes a while to lower its clock
// for the load at hand.
absl::StatusOr<double> Seconds(const std::function<absl::Status()>& run,
                               absl::Duration warm_up = absl::Milliseconds(100)) {
  return MedianSeconds(5, run, warm_up);
}

bool IsCpu(const ops::Ops& ops) { return ops.Info().kind == DeviceKind::kCpu; }

int NumThreads(int threads) { return threads > 0 ? threads : omp_get_num_procs(); }

std::vector<float> RandomFloats(int64_t n) {
  std::vector<float> values(n);
  std::minstd_rand rng(7);
  for (float& v : values) v = static_cast<float>(rng() % 2048) / 1024.0f - 1.0f;
  return values;
}

absl::StatusOr<double> OneDnnSeconds(int threads, const GemmShape& s) {
  const std::vector<float> a = RandomFloats(s.m * s.k), b = RandomFloats(s.k * s.n);
  std::vector<float> c(s.m * s.n);
  omp_set_num_threads(NumThreads(threads));
  return Seconds([&] {
    const dnnl_status_t status =
        dnnl_sgemm(s.trans_a ? 'T' : 'N', s.trans_b ? 'T' : 'N', s.m, s.n, s.k, 1.0f, a.data(),
                   s.trans_a ? s.m : s.k, b.data(), s.trans_b ? s.k : s.n, 0.0f, c.data(), s.n);
    return status == dnnl_success ? absl::OkStatus() : absl::InternalError("oneDNN sgemm failed");
  });
}

absl::StatusOr<double> OpsSeconds(ops::Ops& ops, const GemmShape& s) {
  const DType dtype = ops.Info().compute_dtype;
  const int64_t size = SizeOf(dtype);
  ASSIGN_OR_RETURN(const DeviceBuffer a, ops.Allocate(s.m * s.k * size, "bound a"));
  ASSIGN_OR_RETURN(const DeviceBuffer b, ops.Allocate(s.k * s.n * size, "bound b"));
  const DType out = s.f32_out ? DType::kF32 : dtype;
  ASSIGN_OR_RETURN(const DeviceBuffer c, ops.Allocate(s.m * s.n * SizeOf(out), "bound c"));
  const ops::MatMulParams params = {
      .a = s.trans_a ? View2D(a.data(), dtype, s.k, s.m) : View2D(a.data(), dtype, s.m, s.k),
      .b = s.trans_b ? View2D(b.data(), dtype, s.n, s.k) : View2D(b.data(), dtype, s.k, s.n),
      .trans_a = s.trans_a,
      .trans_b = s.trans_b,
      .c = View2D(c.data(), out, s.m, s.n)};
  RETURN_IF_ERROR(FillRandom(ops, params.a, 1, /*seed=*/1));
  RETURN_IF_ERROR(FillRandom(ops, params.b, 1, /*seed=*/2));
  const auto run = [&]() -> absl::Status {
    RETURN_IF_ERROR(ops.MatMul(params));
    return ops.Synchronize();
  };
  return Seconds(run, absl::Milliseconds(300));
}

uint64_t SumOfWords(const std::vector<uint64_t>& data, int threads) {
  const int64_t n = static_cast<int64_t>(data.size());
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += data[i];
  return total;
}

// Passes over memory far larger than the caches, on all threads: a plain sum, or Ops::SumSquares
// with its wide loads if that reads faster.
absl::StatusOr<double> CpuReadBandwidth(ops::Ops& ops, int threads) {
  const std::vector<uint64_t> data(int64_t{64} << 20, 3);  // 512 MiB
  uint64_t wrong = 0;
  ASSIGN_OR_RETURN(const double plain, Seconds([&] {
                     wrong += SumOfWords(data, NumThreads(threads)) - 3 * data.size();
                     return absl::OkStatus();
                   }));
  RETURN_IF_ERROR(Verify("sum of words", static_cast<double>(wrong), 0));
  const TensorView floats = View1D(const_cast<uint64_t*>(data.data()), DType::kF32,
                                   static_cast<int64_t>(2 * data.size()));
  ASSIGN_OR_RETURN(const double wide, Seconds([&] { return ops.SumSquares(floats).status(); }));
  return static_cast<double>(data.size() * sizeof(uint64_t)) / std::min(plain, wide);
}

absl::StatusOr<double> CopyBandwidth(ops::Ops& ops) {
  const int64_t n = int64_t{256} << 20;  // floats
  ASSIGN_OR_RETURN(const DeviceBuffer a, ops.Allocate(n * 4, "bound copy from"));
  ASSIGN_OR_RETURN(const DeviceBuffer b, ops.Allocate(n * 4, "bound copy to"));
  ASSIGN_OR_RETURN(const double seconds, Seconds([&]() -> absl::Status {
                     RETURN_IF_ERROR(ops.Copy(View1D(a.data(), DType::kF32, n),
                                              View1D(b.data(), DType::kF32, n)));
                     return ops.Synchronize();
                   }));
  return 2.0 * 4.0 * static_cast<double>(n) / seconds;
}

}  // namespace

std::vector<GemmShape> ForwardGemms(const ModelConfig& config, int64_t rows, int64_t head_rows) {
  std::vector<GemmShape> shapes;
  const auto add = [&shapes](int64_t m, int64_t n, int64_t k, int64_t count) {
    if (count > 0) shapes.push_back({.m = m, .n = n, .k = k, .count = count});
  };
  add(rows, config.qkv_dim(), config.hidden, config.num_layers);
  const auto second_half = [&](int64_t m, int64_t layers) {
    add(m, config.hidden, config.q_dim(), layers);
    add(m, 2 * config.ffn, config.hidden, layers);
    add(m, config.hidden, config.ffn, layers);
  };
  second_half(rows, config.num_layers - 1);
  second_half(head_rows, 1);
  shapes.push_back({.m = head_rows, .n = config.vocab, .k = config.hidden, .f32_out = true});
  return shapes;
}

std::vector<GemmShape> BackwardGemms(const std::vector<GemmShape>& forward) {
  std::vector<GemmShape> shapes;
  for (const GemmShape& f : forward) {
    // d_a [m, k] = d_c [m, n] b [n, k];  d_b [n, k] = d_c^T a
    shapes.push_back({.m = f.m, .n = f.k, .k = f.n, .trans_b = false, .count = f.count});
    shapes.push_back({.m = f.n,
                      .n = f.k,
                      .k = f.m,
                      .trans_a = true,
                      .trans_b = false,
                      .count = f.count,
                      .f32_out = true});
  }
  return shapes;
}

absl::StatusOr<double> GemmSeconds(ops::Ops& ops, int threads,
                                   const std::vector<GemmShape>& shapes) {
  double total = 0;
  for (const GemmShape& s : shapes) {
    ASSIGN_OR_RETURN(const double seconds,
                     IsCpu(ops) ? OneDnnSeconds(threads, s) : OpsSeconds(ops, s));
    total += seconds * static_cast<double>(s.count);
  }
  return total;
}

std::string GemmBoundName(const ops::Ops& ops) {
  return IsCpu(ops) ? "oneDNN sgemm of the same shapes" : "Ops::MatMul of the same shapes";
}

std::string BandwidthBoundName(double bytes_per_second) {
  return absl::StrFormat("bytes read at the measured %.1f GB/s", bytes_per_second / 1e9);
}

double UpdateBytes(const ModelConfig& config) {
  return 32.0 * static_cast<double>(NumParameters(config));
}

absl::StatusOr<double> MemoryBandwidth(ops::Ops& ops, int threads) {
  return IsCpu(ops) ? CpuReadBandwidth(ops, threads) : CopyBandwidth(ops);
}

}  // namespace coppice::bench
