// The devices that tests run on, by name: "cpu", "cuda" (computes in bf16), "cuda_f16". Without a
// GPU the cuda instances of a test are skipped, unless REQUIRE_CUDA=1 makes that a failure. With
// PORTABLE_CUDA=1 they run without the kernels for one architecture alone.
#pragma once

#include <cstdlib>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/string_view.h"
#include "kernels/ops/ops.h"
#include "kernels/ops/ops_factory_cuda.h"

namespace coppice {

inline constexpr const char* kDevices[] = {"cpu", "cuda", "cuda_f16"};
inline constexpr const char* kCudaDevices[] = {"cuda", "cuda_f16"};

inline bool OnCuda(absl::string_view device) { return absl::StartsWith(device, "cuda"); }
inline DType ComputeDType(absl::string_view device) {
  if (!OnCuda(device)) return DType::kF32;
  return device == "cuda_f16" ? DType::kF16 : DType::kBF16;
}

// Whether CUDA devices run without the kernels for one architecture alone.
inline bool IsPortable() {
  const char* value = std::getenv("PORTABLE_CUDA");
  return value != nullptr && absl::string_view(value) == "1";
}

inline absl::StatusOr<std::unique_ptr<ops::Ops>> CreateTestOps(absl::string_view device,
                                                               int threads = 0,
                                                               bool deterministic = false) {
  if (!OnCuda(device)) return ops::CreateOps(device, threads, deterministic);
  return ops::CreateCudaOps(deterministic, ComputeDType(device), IsPortable());
}

// Whether a test on `device`, which CreateTestOps has answered with `created`, is to be skipped.
inline bool SkipsDevice(absl::string_view device, const absl::Status& created) {
  return OnCuda(device) && !created.ok() && std::getenv("REQUIRE_CUDA") == nullptr;
}

}  // namespace coppice
