// attention: Ops::TreeAttention and its backward over one prompt and its responses (mode flat: as
// many separate sequences). Bound: the multiplications of the visible (query, key) pairs at
// oneDNN's rate for the products that they consist of.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/base/status_macros.h"
#include "tests/bench/bench_model.h"
#include "tests/bench/benches.h"
#include "tests/bench/bounds.h"
#include "tests/bench/measure.h"
#include "tests/support/reference.h"
#include "tests/support/tolerances.h"

namespace coppice::bench {
namespace {

ops::TokenBatch TreeBatch(const Options& options) {
  ops::TokenBatch batch;
  const auto add_tree = [&](int64_t responses) {
    const int32_t begin = static_cast<int32_t>(batch.num_rows());
    const int32_t end = begin + static_cast<int32_t>(options.prompt + responses * options.response);
    for (int64_t i = 0; i < options.prompt; ++i) {
      batch.positions.push_back(static_cast<int32_t>(i));
      batch.subtree_end.push_back(end);
    }
    for (int64_t r = 0; r < responses; ++r) {
      const int64_t leaf_end = begin + options.prompt + (r + 1) * options.response;
      for (int64_t i = 0; i < options.response; ++i) {
        batch.positions.push_back(static_cast<int32_t>(options.prompt + i));
        batch.subtree_end.push_back(static_cast<int32_t>(leaf_end));
      }
    }
    batch.tokens.resize(batch.positions.size(), 0);
    batch.segments.push_back({begin, end, -1});
  };
  const bool shared = options.mode == Mode::kShared;
  for (int64_t i = 0; i < (shared ? 1 : options.group); ++i) add_tree(shared ? options.group : 1);
  return batch;
}

int64_t VisiblePairs(const ops::TokenBatch& batch) {
  int64_t pairs = 0;
  for (int64_t k = 0; k < batch.num_rows(); ++k) pairs += batch.subtree_end[k] - k;
  return pairs;
}

// Random numbers of a long tensor repeat after as many: a prime, so that no two rows are the same.
constexpr int64_t kPool = 1'000'003;

// Tensors of one attention call with random contents. Names as in TreeAttentionParams.
class Attention {
 public:
  static absl::StatusOr<Attention> Create(ops::Ops& ops, const ModelConfig& config,
                                          const ops::TokenBatch& batch, uint64_t seed) {
    Attention a;
    a.ops_ = &ops;
    a.scale_ = config.attention_scale();
    ASSIGN_OR_RETURN(a.plan_, ops.PlanBatch(batch));
    std::mt19937_64 rng(seed);
    const auto make = [&](TensorView& view, int64_t heads, bool fill) -> absl::Status {
      const DType dtype = ops.Info().compute_dtype;
      const int64_t rows = batch.num_rows(), n = rows * heads * config.head_dim;
      ASSIGN_OR_RETURN(DeviceBuffer buffer, ops.Allocate(n * SizeOf(dtype), "attention"));
      view = View3D(buffer.data(), dtype, rows, heads, config.head_dim);
      a.buffers_.push_back(std::move(buffer));
      if (!fill) return absl::OkStatus();
      std::vector<float> pool(std::min(n, kPool)), values(n);
      std::normal_distribution<float> normal;
      for (float& value : pool) value = normal(rng);
      for (int64_t i = 0; i < n; ++i) values[i] = pool[i % static_cast<int64_t>(pool.size())];
      ASSIGN_OR_RETURN(const DeviceBuffer staging, ops.Allocate(n * 4, "attention staging"));
      const TensorView f32 = View3D(staging.data(), DType::kF32, rows, heads, config.head_dim);
      RETURN_IF_ERROR(ops.Upload(values.data(), f32));
      RETURN_IF_ERROR(ops.Copy(f32, view));
      return ops.Synchronize();
    };
    for (TensorView* view : {&a.q, &a.d_out}) RETURN_IF_ERROR(make(*view, config.q_heads, true));
    for (TensorView* view : {&a.k, &a.v}) RETURN_IF_ERROR(make(*view, config.kv_heads, true));
    for (TensorView* view : {&a.out, &a.d_q}) RETURN_IF_ERROR(make(*view, config.q_heads, false));
    for (TensorView* view : {&a.d_k, &a.d_v}) RETURN_IF_ERROR(make(*view, config.kv_heads, false));
    ASSIGN_OR_RETURN(DeviceBuffer lse, ops.Allocate(batch.num_rows() * config.q_heads * 4, "lse"));
    a.lse_ = View2D(lse.data(), DType::kF32, batch.num_rows(), config.q_heads);
    a.buffers_.push_back(std::move(lse));
    return a;
  }

  absl::Status Forward() {
    RETURN_IF_ERROR(ops_->TreeAttention(
        {.plan = plan_.get(), .q = q, .k = k, .v = v, .scale = scale_, .out = out, .lse = lse_}));
    return ops_->Synchronize();
  }
  absl::Status Backward() {
    ops::TreeAttentionBackwardParams p;
    p.plan = plan_.get();
    p.q = q;
    p.k = k;
    p.v = v;
    p.scale = scale_;
    p.out = out;
    p.lse = lse_;
    p.d_out = d_out;
    p.d_q = d_q;
    p.d_k = d_k;
    p.d_v = d_v;
    RETURN_IF_ERROR(ops_->TreeAttentionBackward(p));
    return ops_->Synchronize();
  }
  absl::StatusOr<reference::Vector> Read(TensorView view) {
    ASSIGN_OR_RETURN(const DeviceBuffer staging,
                     ops_->Allocate(view.num_elements() * 4, "attention staging"));
    const TensorView f32 =
        View3D(staging.data(), DType::kF32, view.dim(0), view.dim(1), view.dim(2));
    RETURN_IF_ERROR(ops_->Copy(view, f32));
    std::vector<float> values(view.num_elements());
    RETURN_IF_ERROR(ops_->Download(f32, values.data()));
    return reference::Vector(values.begin(), values.end());
  }

  TensorView q, k, v, out, d_out, d_q, d_k, d_v;  // [rows, q_heads or kv_heads, head_dim] f

 private:
  ops::Ops* ops_ = nullptr;
  std::unique_ptr<ops::BatchPlan> plan_;
  float scale_ = 0;
  TensorView lse_;  // [rows, q_heads] f32
  std::vector<DeviceBuffer> buffers_;
};

double LargestError(const reference::Vector& want, const reference::Vector& got) {
  double largest = 0, error = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    largest = std::max(largest, std::abs(want[i]));
    error = std::max(error, std::abs(want[i] - got[i]));
  }
  return error / largest;
}

// A small tree against plain loops in double precision: the output, and the gradients along a
// random direction against central differences.
absl::Status VerifySmall(Options options, const ModelConfig& config, ops::Ops& ops) {
  options.prompt = std::min<int64_t>(options.prompt, 13);
  options.response = std::min<int64_t>(options.response, 5);
  options.group = std::min<int64_t>(options.group, 3);
  const ops::TokenBatch batch = TreeBatch(options);
  ASSIGN_OR_RETURN(Attention a, Attention::Create(ops, config, batch, options.seed));
  RETURN_IF_ERROR(a.Forward());
  RETURN_IF_ERROR(a.Backward());
  reference::AttentionInputs in;
  ASSIGN_OR_RETURN(in.q, a.Read(a.q));
  ASSIGN_OR_RETURN(in.k, a.Read(a.k));
  ASSIGN_OR_RETURN(in.v, a.Read(a.v));
  ASSIGN_OR_RETURN(const reference::Vector out, a.Read(a.out));
  ASSIGN_OR_RETURN(const reference::Vector d_out, a.Read(a.d_out));
  const reference::AttentionShape shape{config.q_heads, config.kv_heads, config.head_dim};
  const double scale = config.attention_scale();
  const bool f32 = ops.Info().compute_dtype == DType::kF32;
  constexpr double kHalfPrecision = 2e-2;  // of a bf16 output
  RETURN_IF_ERROR(Verify("attention",
                         LargestError(reference::TreeAttention(batch, in, shape, scale), out),
                         f32 ? tolerance::kOpForward : kHalfPrecision));

  std::mt19937_64 rng(options.seed);
  std::normal_distribution<double> normal;
  double gradient = 0, magnitude = 0, difference = 0;
  reference::AttentionInputs above = in, below = in;
  const auto move = [&](TensorView d, reference::Vector& up,
                        reference::Vector& down) -> absl::Status {
    ASSIGN_OR_RETURN(const reference::Vector g, a.Read(d));
    for (size_t i = 0; i < g.size(); ++i) {
      const double direction = normal(rng), step = tolerance::kFiniteDifferenceStep * direction;
      gradient += g[i] * direction;
      magnitude += std::abs(g[i] * direction);
      up[i] += step;
      down[i] -= step;
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(move(a.d_q, above.q, below.q));
  RETURN_IF_ERROR(move(a.d_k, above.k, below.k));
  RETURN_IF_ERROR(move(a.d_v, above.v, below.v));
  const reference::Vector high = reference::TreeAttention(batch, above, shape, scale);
  const reference::Vector low = reference::TreeAttention(batch, below, shape, scale);
  for (size_t i = 0; i < high.size(); ++i) {
    difference += d_out[i] * (high[i] - low[i]) / (2 * tolerance::kFiniteDifferenceStep);
  }
  return Verify("attention gradients", std::abs(gradient - difference) / magnitude,
                f32 ? tolerance::kOpBackward : kHalfPrecision);
}

// Multiply-adds a second of Q K^T and P V as dense products of one head.
absl::StatusOr<double> ProductRate(ops::Ops& ops, int threads, int64_t rows, int64_t head_dim) {
  const int64_t m = std::min<int64_t>(rows, 512), n = std::min<int64_t>(rows, 4096);
  ASSIGN_OR_RETURN(const double seconds,
                   GemmSeconds(ops, threads,
                               {{.m = m, .n = n, .k = head_dim},
                                {.m = m, .n = head_dim, .k = n, .trans_b = false}}));
  return 2.0 * static_cast<double>(m * n * head_dim) / seconds;
}

}  // namespace

absl::Status RunAttention(const Options& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<ops::Ops> ops, OpenDevice(options));
  ASSIGN_OR_RETURN(const ModelConfig config, NamedGeometry(options.geometry));
  RETURN_IF_ERROR(VerifySmall(options, config, *ops));

  const ops::TokenBatch batch = TreeBatch(options);
  ASSIGN_OR_RETURN(Attention a, Attention::Create(*ops, config, batch, options.seed));
  const double product =  // multiply-adds of one product over the visible pairs
      static_cast<double>(VisiblePairs(batch)) * static_cast<double>(config.q_dim());
  Result result{.bench = "attention",
                .bound = "visible pairs at the rate of " + GemmBoundName(*ops),
                .device = ops->Info().name,
                .pass = "forward"};
  ASSIGN_OR_RETURN(result.seconds, MedianSeconds(options.repeats, [&] { return a.Forward(); }));
  ASSIGN_OR_RETURN(const double rate, ProductRate(*ops, static_cast<int>(options.threads),
                                                  batch.num_rows(), config.head_dim));
  result.bound_seconds = 2 * product / rate;  // Q K^T, P V
  Print(options, result);
  result.pass = "backward";
  ASSIGN_OR_RETURN(result.seconds, MedianSeconds(options.repeats, [&] { return a.Backward(); }));
  result.bound_seconds = 5 * product / rate;  // Q K^T again, dP = dO V^T, dV, dQ, dK
  Print(options, result);
  return absl::OkStatus();
}

}  // namespace coppice::bench
