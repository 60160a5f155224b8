#include "trainer/policy_trainer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "trainer/checkpoint.h"

namespace coppice {
namespace {

// On the CPU half of what is free, since others live there. On a device what is left beside
// gradients, both moments, the remainders of masters and what ops need; should that be little, an
// eighth.
int64_t DefaultActivationBytes(const ModelConfig& config, DType gradient_dtype,
                               const ops::DeviceInfo& info) {
  if (info.kind == DeviceKind::kCpu) return info.free_bytes / 2;
  const int64_t state_bytes =
      GradientArena::SizeBytes(config, gradient_dtype) +
      NumParameterElements(config) * (2 * SizeOf(DType::kF32) + SizeOf(DType::kBF16));
  return std::max(info.free_bytes - state_bytes - info.op_scratch_bytes, info.free_bytes / 8);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Trainer>> Trainer::Create(const Options& options, Model& model,
                                                         const Decoder& decoder,
                                                         const Clock& clock) {
  if (options.max_rows <= 0 || options.activation_bytes < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "trainer refused: max_rows wants to be positive and activation_bytes not negative, got ",
        options.max_rows, " and ", options.activation_bytes));
  }
  if (options.gradient_dtype != DType::kF32 && options.gradient_dtype != DType::kBF16) {
    return absl::InvalidArgumentError(absl::StrCat(
        "trainer refused: gradient_dtype wants f32 or bf16, got ", Name(options.gradient_dtype)));
  }
  const DType compute_dtype = decoder.ops().Info().compute_dtype;
  if (compute_dtype == DType::kF16 && options.gradient_dtype != DType::kF32) {
    return absl::InvalidArgumentError(absl::StrCat(
        "trainer refused: gradient_dtype wants f32 on a device that computes in f16, got ",
        Name(options.gradient_dtype), "; use --gradient_dtype=f32 or --compute_dtype=bf16"));
  }
  const int64_t budget =
      options.activation_bytes > 0
          ? options.activation_bytes
          : DefaultActivationBytes(decoder.config(), options.gradient_dtype, decoder.ops().Info());
  const ops::ActivationTypes types = decoder.ops().Info().activation_types();
  if (Activations::MaxRows(decoder.config(), types, budget) < 1) {
    return absl::ResourceExhaustedError(
        absl::StrCat("trainer refused: ", budget,
                     " bytes of activations hold no token; raise --activation_bytes"));
  }
  return std::make_unique<PolicyTrainer>(options, budget, model, decoder, clock);
}

PolicyTrainer::PolicyTrainer(const Options& options, int64_t activation_bytes, Model& model,
                             const Decoder& decoder, const Clock& clock)
    : activation_bytes_(activation_bytes),
      model_(model),
      decoder_(decoder),
      ops_(decoder.ops()),
      clock_(clock),
      limits_(MakeLimits(options)),
      gradient_dtype_(options.gradient_dtype),
      scale_(options.scale_gradients || ops_.Info().compute_dtype == DType::kF16) {}

PassLimits PolicyTrainer::MakeLimits(const Options& options) const {
  const ops::DeviceInfo device = ops_.Info();
  PassLimits limits{
      .max_rows = std::min(
          options.max_rows,
          Activations::MaxRows(decoder_.config(), device.activation_types(), activation_bytes_)),
      .share_prefixes = options.share_prefixes,
      .slow_context = options.slow_context};
  limits.pass_rows = limits.max_rows;
  if (device.context_gradients) {
    limits.max_branch_rows = [this, max_rows = options.max_rows](int64_t prompt_rows) {
      return MaxBranchRows(max_rows, prompt_rows);
    };
  }
  return limits;
}

PassLimits PolicyTrainer::CurrentLimits() const {
  PassLimits limits = limits_;
  limits.version = version_;
  return limits;
}

absl::Status PolicyTrainer::SaveCheckpoint(absl::string_view directory) {
  if (pending_gradients_) {
    return absl::FailedPreconditionError(
        "checkpoint refused: gradients are pending; call OptimStep first");
  }
  return WriteCheckpoint(
      CheckpointView{.config = decoder_.config(),
                     .params = model_.params,
                     .optimizer = optimizer_.has_value() ? &*optimizer_ : nullptr,
                     .version = version_,
                     .scale = scale_.history()},
      directory, ops_);
}

absl::Status PolicyTrainer::LoadCheckpoint(absl::string_view directory) {
  ASSIGN_OR_RETURN(const std::unique_ptr<CheckpointReader> reader,
                   CheckpointReader::Open(decoder_.config(), directory));
  std::optional<Optimizer> optimizer;
  if (reader->has_optimizer()) {
    pass_memory_ = DeviceBuffer();  // two optimizers exist until the new one is read
    ASSIGN_OR_RETURN(optimizer, Optimizer::Create(decoder_.config(), model_.params, ops_));
    RETURN_IF_ERROR(reader->ReadOptimizer(*optimizer, ops_));
  }
  // The file is mapped and checked: from here on only the device can fail.
  RETURN_IF_ERROR(
      reader->ReadWeights(model_.params, optimizer.has_value() ? &*optimizer : nullptr, ops_));
  optimizer_ = std::move(optimizer);
  version_ = reader->version();
  scale_.set_history(reader->scale());
  return DropGradients();
}

}  // namespace coppice
