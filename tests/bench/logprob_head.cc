// logprob_head: the head over group * response rows, forward and backward. Bound: its products
// alone (one forward, two backward), by the library's own time. Memory is lent for what forward can
// keep for backward, as the trainer does.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/base/status_macros.h"
#include "tests/bench/bench_model.h"
#include "tests/bench/benches.h"
#include "tests/bench/bounds.h"
#include "tests/bench/measure.h"
#include "tests/bench/random_tensor.h"
#include "tests/support/tolerances.h"
#include "trainer/host_view.h"

namespace coppice::bench {
namespace {

// One target a row, random tensors.
class Head {
 public:
  static absl::StatusOr<Head> Create(const ModelConfig& config, int64_t rows, uint64_t seed,
                                     ops::Ops& ops);
  absl::Status Forward() {
    return ops_->LogProbHead({.hidden = hidden_,
                              .weight = weight_,
                              .target_indptr = HostView(indptr_),
                              .targets = HostView(targets_),
                              .logprobs = HostView(logprobs_),
                              .entropy = HostView(entropy_),
                              .lse = HostView(lse_),
                              .kept = kept_});
  }
  absl::Status Backward() {
    RETURN_IF_ERROR(ops_->LogProbHeadBackward({.hidden = hidden_,
                                               .weight = weight_,
                                               .target_indptr = HostView(indptr_),
                                               .targets = HostView(targets_),
                                               .lse = HostView(lse_),
                                               .entropy = HostView(entropy_),
                                               .d_logprobs = HostView(d_logprobs_),
                                               .d_hidden = d_hidden_,
                                               .d_weight = d_weight_,
                                               .kept = kept_}));
    return ops_->Synchronize();
  }
  // Weights of scale 1 / sqrt(hidden) leave logits of size 1: entropy near that of a uniform guess.
  absl::Status Check() const {
    double error = 0;
    for (const float e : entropy_) {
      error = std::max(error, std::abs(double{e} / std::log(double(weight_.dim(0))) - 1));
    }
    return Verify("entropy of random logits", error, tolerance::kRandomEntropy);
  }

 private:
  ops::Ops* ops_ = nullptr;
  DeviceBuffer buffers_[5];
  TensorView hidden_, weight_, d_hidden_, d_weight_, kept_;
  std::vector<int32_t> indptr_, targets_;
  std::vector<float> logprobs_, entropy_, lse_, d_logprobs_;
};

absl::StatusOr<Head> Head::Create(const ModelConfig& config, int64_t rows, uint64_t seed,
                                  ops::Ops& ops) {
  const DType dtype = ops.Info().compute_dtype;
  const int64_t vocab = config.vocab, hidden = config.hidden, size = SizeOf(dtype);
  Head head;
  head.ops_ = &ops;
  ASSIGN_OR_RETURN(head.buffers_[0], ops.Allocate(rows * hidden * size, "bench hidden"));
  ASSIGN_OR_RETURN(head.buffers_[1], ops.Allocate(vocab * hidden * size, "bench head"));
  ASSIGN_OR_RETURN(head.buffers_[2], ops.Allocate(rows * hidden * size, "bench d_hidden"));
  ASSIGN_OR_RETURN(head.buffers_[3], ops.Allocate(vocab * hidden * 4, "bench d_head"));
  const int64_t kept_bytes = rows * (vocab + hidden) * size;  // more than any device wants
  ASSIGN_OR_RETURN(head.buffers_[4], ops.Allocate(kept_bytes, "bench head, kept"));
  head.kept_ = View1D(head.buffers_[4].data(), DType::kU8, kept_bytes);
  head.hidden_ = View2D(head.buffers_[0].data(), dtype, rows, hidden);
  head.weight_ = View2D(head.buffers_[1].data(), dtype, vocab, hidden);
  head.d_hidden_ = View2D(head.buffers_[2].data(), dtype, rows, hidden);
  head.d_weight_ = View2D(head.buffers_[3].data(), DType::kF32, vocab, hidden);
  RETURN_IF_ERROR(FillRandom(ops, head.hidden_, 1, seed));
  RETURN_IF_ERROR(
      FillRandom(ops, head.weight_, 1 / std::sqrt(static_cast<float>(hidden)), seed + 1));
  std::mt19937_64 random(seed + 2);
  head.indptr_.push_back(0);
  for (int64_t r = 0; r < rows; ++r) {
    head.targets_.push_back(static_cast<int32_t>(random() % vocab));
    head.indptr_.push_back(static_cast<int32_t>(r + 1));
    head.d_logprobs_.push_back(r % 2 == 0 ? 1.0f : -0.5f);
  }
  head.logprobs_.resize(rows);
  head.entropy_.resize(rows);
  head.lse_.resize(rows);
  return head;
}

}  // namespace

absl::Status RunLogProbHead(const Options& options) {
  ASSIGN_OR_RETURN(const ModelConfig config, NamedGeometry(options.geometry));
  ASSIGN_OR_RETURN(const std::unique_ptr<ops::Ops> ops, OpenDevice(options));
  const int64_t rows = options.group * options.response;
  ASSIGN_OR_RETURN(Head head, Head::Create(config, rows, options.seed, *ops));
  RETURN_IF_ERROR(head.Forward());
  RETURN_IF_ERROR(head.Check());
  ASSIGN_OR_RETURN(const std::vector<double> seconds,
                   MedianSecondsOfStages(options.repeats, {[&] { return head.Forward(); },
                                                           [&] { return head.Backward(); }}));
  const std::vector<GemmShape> forward = {
      {.m = rows, .n = config.vocab, .k = config.hidden, .f32_out = true}};
  const std::vector<GemmShape> backward = BackwardGemms(forward);
  const int threads = static_cast<int>(options.threads);
  ASSIGN_OR_RETURN(const double forward_bound, GemmSeconds(*ops, threads, forward));
  ASSIGN_OR_RETURN(const double backward_bound, GemmSeconds(*ops, threads, backward));
  for (const auto& [pass, time, bound] : {std::tuple("forward", seconds[0], forward_bound),
                                          {"backward", seconds[1], backward_bound}}) {
    Print(options, {.bench = "logprob_head",
                    .seconds = time,
                    .bound_seconds = bound,
                    .bound = GemmBoundName(*ops),
                    .device = ops->Info().name,
                    .pass = pass});
  }
  return absl::OkStatus();
}

}  // namespace coppice::bench
