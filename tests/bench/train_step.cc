// train_step: forward, loss and backward over one prompt with its responses, then AdamW. With
// --mode=kept from what a prefill has kept of the prompt, which then is not run forward; with
// --mode=flat every sample apart. `counts` says what ran and the most memory in use. Bounds:
// the library's own time for the GEMMs of forward and backward over the rows that the mode runs;
// the bytes of the update at the measured bandwidth of memory.
#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "tests/bench/bench_model.h"
#include "tests/bench/benches.h"
#include "tests/bench/bounds.h"
#include "tests/bench/measure.h"
#include "tests/support/kept_prompt.h"
#include "tests/support/tolerances.h"
#include "trainer/gradient_arena.h"
#include "trainer/trainer.h"

namespace coppice::bench {
namespace {

const SteadyClock kClock;

// One group; flat: each sample is a group of its own.
ForwardBackwardRequest MakeRequest(const Options& options, const BenchModel& bench) {
  ForwardBackwardRequest request;
  for (int64_t i = 0; i < options.group; ++i) {
    TrainSample sample;
    sample.tokens = bench.RandomTokens(options.response, options.seed + 1 + i);
    sample.advantages = {i % 2 == 0 ? 1.0f : -0.5f};
    if (i == 0 || options.mode == Mode::kFlat) {
      request.groups.emplace_back();
      request.groups.back().prompt = bench.RandomTokens(options.prompt, options.seed);
    }
    request.groups.back().samples.push_back(std::move(sample));
  }
  request.return_logprobs = false;
  return request;
}

// Shared: the whole group in one pass. Flat: as many sequences as a pass of usual size holds, at
// least one, so that what shared keeps of activations flat need not recompute.
int64_t RowsOfAPass(const Options& options) {
  constexpr int64_t kFlatRows = 16384;
  const int64_t sequence = options.prompt + options.response;
  return options.mode == Mode::kFlat ? std::max(sequence, kFlatRows) : options.group * sequence;
}

absl::StatusOr<std::unique_ptr<Trainer>> MakeTrainer(const Options& options, BenchModel& bench) {
  Trainer::Options trainer_options;
  trainer_options.share_prefixes = options.mode != Mode::kFlat;
  trainer_options.max_rows = RowsOfAPass(options);
  if (options.bf16_gradients) trainer_options.gradient_dtype = DType::kBF16;
  return Trainer::Create(trainer_options, bench.model(), bench.decoder(), kClock);
}

// Of the request's prompt, if the mode asks for it; else null.
absl::StatusOr<std::shared_ptr<KeptPrompt>> KeepIfAsked(const Options& options, BenchModel& bench,
                                                        ForwardBackwardRequest& request) {
  if (options.mode != Mode::kKept) return nullptr;
  constexpr int64_t kPiece = 2048;
  TrainGroup& group = request.groups[0];
  ASSIGN_OR_RETURN(
      std::shared_ptr<KeptPrompt> kept,
      KeepPrompt(bench.decoder(), bench.model().params, group.prompt, PolicyVersion{0}, kPiece));
  group.kept_prompt = kept;
  return kept;
}

absl::StatusOr<std::vector<float>> Gradients(const Options& options, BenchModel& bench) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Trainer> trainer, MakeTrainer(options, bench));
  ForwardBackwardRequest request = MakeRequest(options, bench);
  RETURN_IF_ERROR(KeepIfAsked(options, bench, request).status());
  RETURN_IF_ERROR(trainer->ForwardBackward(request).status());
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
  if (options.mode == Mode::kFlat) options.mode = Mode::kShared;
  options.bf16_gradients = false;  // exact sums are compared
  ASSIGN_OR_RETURN(const std::vector<float> shared, Gradients(options, bench));
  options.mode = Mode::kFlat;
  ASSIGN_OR_RETURN(const std::vector<float> flat, Gradients(options, bench));
  const DType dtype = bench.ops().Info().compute_dtype;
  return Verify("gradients of a shared prompt", RelativeError(flat, shared),
                dtype == DType::kF32   ? tolerance::kTreeVersusFlat
                : dtype == DType::kF16 ? tolerance::kF16Model
                                       : tolerance::kBf16Model);
}

absl::StatusOr<double> GemmBoundSeconds(const Options& options, BenchModel& bench) {
  const int64_t sequences = options.group, own = options.response - 1;  // the last needs no row
  const bool shared = options.mode != Mode::kFlat;
  const int64_t rows =
      shared ? options.prompt + sequences * own : sequences * (options.prompt + own);
  const int64_t head_rows = shared ? 1 + sequences * own : sequences * options.response;
  std::vector<GemmShape> gemms = ForwardGemms(bench.config(), rows, head_rows);
  const std::vector<GemmShape> backward = BackwardGemms(gemms);
  gemms.insert(gemms.end(), backward.begin(), backward.end());
  return GemmSeconds(bench.ops(), static_cast<int>(options.threads), gemms);
}

// Families of ops and their share of one more forward and backward.
absl::Status AddPhases(ops::ProfiledOps& profiled, const Stage& forward_backward, Result& result) {
  RETURN_IF_ERROR(profiled.Take().status());  // what came before
  RETURN_IF_ERROR(forward_backward());
  ASSIGN_OR_RETURN(const ops::OpProfile profile, profiled.Take());
  for (int f = 0; f < ops::kNumOpFamilies; ++f) {
    const ops::OpProfile::Entry& entry = profile.families[f];
    if (entry.calls == 0) continue;
    const std::string name = Name(static_cast<ops::OpFamily>(f));
    result.phases.emplace_back(name, entry.seconds);
    result.phases.emplace_back(name + "_longest", entry.longest_seconds);
  }
  result.phases.emplace_back("gaps", profile.gap_seconds);
  result.phases.emplace_back("total", profile.total_seconds);
  return absl::OkStatus();
}

// The norm and the update read each gradient once.
double UpdateBytes(const Options& options, const ModelConfig& config) {
  if (!options.bf16_gradients) return bench::UpdateBytes(config);
  const int64_t saved = GradientArena::SizeBytes(config, DType::kF32) -
                        GradientArena::SizeBytes(config, DType::kBF16);
  return bench::UpdateBytes(config) - 2 * static_cast<double>(saved);
}

// What a step ran and held.
std::vector<std::pair<std::string, int64_t>> Counts(const Options& options,
                                                    const ForwardBackwardResult& done,
                                                    const ops::DeviceInfo& device) {
  const int64_t prompts = options.mode == Mode::kFlat ? options.group : 1;
  const auto metric = [&](const char* name) { return static_cast<int64_t>(done.metrics.at(name)); };
  std::vector<std::pair<std::string, int64_t>> counts = {
      {"tokens_run", done.tokens.unique - done.tokens.prompt_forward_skipped},
      {"prompt_tokens_run", prompts * options.prompt - done.tokens.prompt_forward_skipped},
      {"passes", metric("passes")},
      {"micro_batches", metric("micro_batches")},
      {"recompute", metric("recompute")},
      {"activation_bytes", metric("activation_bytes")}};
  // Buffers only grow: what the device lacks now is the most that it lacked.
  if (device.kind == DeviceKind::kCuda) {
    counts.emplace_back("peak_bytes", device.total_bytes - device.free_bytes);
  }
  return counts;
}

}  // namespace

absl::Status RunTrainStep(const Options& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<BenchModel> bench, BenchModel::Create(options));
  RETURN_IF_ERROR(VerifyGradients(options, *bench));

  ASSIGN_OR_RETURN(std::unique_ptr<Trainer> trainer, MakeTrainer(options, *bench));
  ForwardBackwardRequest request = MakeRequest(options, *bench);
  ASSIGN_OR_RETURN(std::shared_ptr<KeptPrompt> kept, KeepIfAsked(options, *bench, request));
  const AdamConfig adam{.learning_rate = 1e-6f};
  ForwardBackwardResult done;
  const Stage forward_backward = [&]() -> absl::Status {
    ASSIGN_OR_RETURN(done, trainer->ForwardBackward(request));
    return absl::OkStatus();
  };
  const Stage update = [&]() -> absl::Status {
    RETURN_IF_ERROR(trainer->OptimStep(adam).status());
    if (kept != nullptr) kept->version = trainer->policy_version();  // as if prefilled again
    return bench->ops().Synchronize();
  };
  ASSIGN_OR_RETURN(const std::vector<double> seconds,
                   MedianSecondsOfStages(options.repeats, {forward_backward, update}));
  const std::string device = bench->ops().Info().name;

  Result gradients{
      .bench = "train_step", .seconds = seconds[0], .device = device, .pass = "forward_backward"};
  if (options.phases) {
    RETURN_IF_ERROR(AddPhases(*bench->profiled_ops(), forward_backward, gradients));
  }
  gradients.counts = Counts(options, done, bench->ops().Info());
  trainer.reset();  // bounds need its memory
  request.groups[0].kept_prompt.reset();
  kept.reset();
  ASSIGN_OR_RETURN(gradients.bound_seconds, GemmBoundSeconds(options, *bench));
  gradients.bound = GemmBoundName(bench->ops());
  Print(options, gradients);

  Result adamw{.bench = "train_step", .seconds = seconds[1], .device = device, .pass = "adamw"};
  ASSIGN_OR_RETURN(const double bandwidth,
                   MemoryBandwidth(bench->ops(), static_cast<int>(options.threads)));
  adamw.bound_seconds = UpdateBytes(options, bench->config()) / bandwidth;
  adamw.bound = BandwidthBoundName(bandwidth);
  Print(options, adamw);
  return absl::OkStatus();
}

}  // namespace coppice::bench
