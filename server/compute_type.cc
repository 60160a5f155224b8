#include "server/compute_type.h"

#include "absl/strings/str_cat.h"

namespace coppice {

absl::StatusOr<ComputeType> ChooseComputeType(const Config& config) {
  if (config.device == "cpu") return ComputeType{DType::kF32, "device cpu"};
  if (config.compute_dtype != "auto") {
    return ComputeType{config.compute_dtype == "f16" ? DType::kF16 : DType::kBF16,
                       "--compute_dtype"};
  }
  if (config.model.empty()) return ComputeType{DType::kBF16, "random weights"};
  return ComputeTypeOf(config.model);
}

absl::Status CheckGradientType(const Config& config, const ComputeType& compute) {
  if (compute.dtype != DType::kF16 || config.GradientDType() == DType::kF32) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "bad flag: --gradient_dtype: want f32 where compute_dtype is f16 (", compute.because,
      "), got ", config.gradient_dtype, "; use --gradient_dtype=f32 or --compute_dtype=bf16"));
}

}  // namespace coppice
