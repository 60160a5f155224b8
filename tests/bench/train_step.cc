// train_step: forward, loss, backward and AdamW over one prompt with its responses. Bound: oneDNN's
// own time for the GEMMs of forward and backward over the rows that the mode runs, and the bytes of
// AdamW at the measured bandwidth of memory.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "tests/bench/bench_model.h"
#include "tests/bench/benches.h"
#include "tests/bench/bounds.h"
#include "tests/bench/measure.h"
#include "tests/support/tolerances.h"
#include "trainer/trainer.h"

namespace coppice::bench {
namespace {

const SteadyClock kClock;

ForwardBackwardRequest MakeRequest(const Options& options, const BenchModel& bench) {
  TrainGroup group;
  group.prompt = bench.RandomTokens(options.prompt, options.seed);
  for (int64_t i = 0; i < options.group; ++i) {
    TrainSample sample;
    sample.tokens = bench.RandomTokens(options.response, options.seed + 1 + i);
    sample.advantages = {i % 2 == 0 ? 1.0f : -0.5f};
    group.samples.push_back(std::move(sample));
  }
  ForwardBackwardRequest request;
  request.groups = {std::move(group)};
  request.return_logprobs = false;
  return request;
}

absl::StatusOr<std::unique_ptr<Trainer>> MakeTrainer(const Options& options, BenchModel& bench) {
  Trainer::Options trainer_options;
  trainer_options.share_prefixes = options.mode == Mode::kShared;
  trainer_options.max_rows = options.group * (options.prompt + options.response);  // one pass
  return Trainer::Create(trainer_options, bench.model(), bench.decoder(), kClock);
}

absl::StatusOr<std::vector<float>> Gradients(const Options& options, BenchModel& bench) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Trainer> trainer, MakeTrainer(options, bench));
  RETURN_IF_ERROR(trainer->ForwardBackward(MakeRequest(options, bench)).status());
  // Of a large model its upper layers.
  constexpr int64_t kMaxElements = int64_t{1} << 27;
  TensorView flat = trainer->gradients().flat;
  flat = flat.Rows(std::max<int64_t>(0, flat.dim(0) - kMaxElements), flat.dim(0));
  std::vector<float> gradients(flat.num_elements());
  RETURN_IF_ERROR(bench.ops().Download(flat, gradients.data()));
  return gradients;
}

// A small group: gradients through the shared prompt are those of the separate sequences.
absl::Status VerifyGradients(Options options, BenchModel& bench) {
  options.prompt = std::min<int64_t>(options.prompt, 24);
  options.response = std::min<int64_t>(options.response, 5);
  options.group = std::min<int64_t>(options.group, 3);
  options.mode = Mode::kShared;
  ASSIGN_OR_RETURN(const std::vector<float> shared, Gradients(options, bench));
  options.mode = Mode::kFlat;
  ASSIGN_OR_RETURN(const std::vector<float> flat, Gradients(options, bench));
  const bool f32 = bench.ops().Info().compute_dtype == DType::kF32;
  return Verify("gradients of a shared prompt", RelativeError(flat, shared),
                f32 ? tolerance::kTreeVersusFlat : tolerance::kBf16Model);
}

absl::StatusOr<double> BoundSeconds(const Options& options, BenchModel& bench) {
  const int64_t sequences = options.group, own = options.response - 1;  // the last needs no row
  const bool shared = options.mode == Mode::kShared;
  const int64_t rows =
      shared ? options.prompt + sequences * own : sequences * (options.prompt + own);
  const int64_t head_rows = shared ? 1 + sequences * own : sequences * options.response;
  std::vector<GemmShape> gemms = ForwardGemms(bench.config(), rows, head_rows);
  const std::vector<GemmShape> backward = BackwardGemms(gemms);
  gemms.insert(gemms.end(), backward.begin(), backward.end());
  ASSIGN_OR_RETURN(const double gemm_seconds,
                   GemmSeconds(bench.ops(), static_cast<int>(options.threads), gemms));
  ASSIGN_OR_RETURN(const double bandwidth,
                   MemoryBandwidth(bench.ops(), static_cast<int>(options.threads)));
  // AdamW reads param, grad, m, v and writes param, m, v; f32 each.
  const double adam_bytes = 7.0 * 4.0 * static_cast<double>(NumParameters(bench.config()));
  return gemm_seconds + adam_bytes / bandwidth;
}

}  // namespace

absl::Status RunTrainStep(const Options& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<BenchModel> bench, BenchModel::Create(options));
  RETURN_IF_ERROR(VerifyGradients(options, *bench));

  ASSIGN_OR_RETURN(const std::unique_ptr<Trainer> trainer, MakeTrainer(options, *bench));
  const ForwardBackwardRequest request = MakeRequest(options, *bench);
  const AdamConfig adam{.learning_rate = 1e-6f};
  Result result{.bench = "train_step"};
  ASSIGN_OR_RETURN(result.seconds, MedianSeconds(options.repeats, [&]() -> absl::Status {
                     RETURN_IF_ERROR(trainer->ForwardBackward(request).status());
                     return trainer->OptimStep(adam).status();
                   }));
  ASSIGN_OR_RETURN(result.bound_seconds, BoundSeconds(options, *bench));
  result.bound = GemmBoundName(bench->ops()) + " + adamw bytes at memory bandwidth";
  result.device = bench->ops().Info().name;
  Print(options, result);
  return absl::OkStatus();
}

}  // namespace coppice::bench
