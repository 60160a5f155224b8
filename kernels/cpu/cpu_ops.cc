#include "kernels/cpu/cpu_ops.h"

#include <sched.h>
#include <sys/sysinfo.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/clock.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/batch_plan.h"
#include "kernels/cpu/families.h"

namespace coppice::cpu {
namespace {

std::string ProcessorName() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    const size_t colon = line.find(": ");
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos)
      return line.substr(colon + 2);
  }
  return "unknown processor";
}

// Processors that this process may run on.
int NumProcessors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return 1;
  return std::max(1, CPU_COUNT(&set));
}

absl::Status CheckContiguous(absl::string_view op, const TensorView& t) {
  if (t.contiguous() && (t.data != nullptr || t.num_elements() == 0)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(op, ": want dense memory, got a strided or null view; copy it first"));
}

// An op is done when its call returns: wall time is the device's time.
class WallTimeline final : public ops::Timeline {
 public:
  absl::Status Mark() override {
    marks_.push_back(clock_.Now());
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<double>> Take() override {
    std::vector<double> seconds;
    for (const absl::Duration mark : marks_) {
      seconds.push_back(absl::ToDoubleSeconds(mark - marks_.front()));
    }
    marks_.clear();
    return seconds;
  }

 private:
  SteadyClock clock_;
  std::vector<absl::Duration> marks_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ops::Timeline>> CpuOps::CreateTimeline() {
  return std::make_unique<WallTimeline>();
}

absl::StatusOr<std::unique_ptr<ops::Ops>> CpuOps::Create(int threads) {
  if (threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("cpu device: want threads >= 0, got ", threads, "; use 0 for every core"));
  }
  const int num_threads = threads > 0 ? threads : NumProcessors();
  return std::unique_ptr<ops::Ops>(new CpuOps(num_threads));
}

ops::DeviceInfo CpuOps::Info() const {
  struct sysinfo memory = {};
  sysinfo(&memory);
  return {.kind = DeviceKind::kCpu,
          .name = absl::StrCat("cpu ", ProcessorName(), ", ", context_.num_threads(), " threads"),
          .compute_dtype = DType::kF32,
          .total_bytes = static_cast<int64_t>(memory.totalram) * memory.mem_unit,
          .free_bytes = static_cast<int64_t>(memory.freeram) * memory.mem_unit,
          .context_gradients = true};
}

absl::StatusOr<DeviceBuffer> CpuOps::Allocate(int64_t size_bytes, absl::string_view label) {
  if (size_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("allocate ", label, ": want bytes >= 0, got ", size_bytes, "; fix the size"));
  }
  const int64_t rounded = (size_bytes / 64 + 1) * 64;
  // More than the machine has would be granted by the kernel and killed at the first touch.
  const bool possible = rounded <= Info().total_bytes;
  void* data = possible ? std::aligned_alloc(64, rounded) : nullptr;
  if (data == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("out of memory for ", label, ": want ", rounded, " bytes, have ",
                     Info().free_bytes, " free; lower the budget or use a larger machine"));
  }
  std::memset(data, 0, rounded);
  return DeviceBuffer(data, size_bytes, [](void* p) { std::free(p); });
}

absl::Status CpuOps::Upload(const void* host, TensorView dst) {
  RETURN_IF_ERROR(CheckContiguous("upload", dst));
  if (dst.num_bytes() > 0) std::memcpy(dst.data, host, dst.num_bytes());
  return absl::OkStatus();
}

absl::Status CpuOps::Download(TensorView src, void* host) {
  RETURN_IF_ERROR(CheckContiguous("download", src));
  if (src.num_bytes() > 0) std::memcpy(host, src.data, src.num_bytes());
  return absl::OkStatus();
}

absl::Status CpuOps::Zero(TensorView dst) {
  RETURN_IF_ERROR(CheckContiguous("zero", dst));
  if (dst.num_bytes() > 0) std::memset(dst.data, 0, dst.num_bytes());
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<ops::BatchPlan>> CpuOps::PlanBatch(const ops::TokenBatch& batch) {
  // Ids are bounded by the tensors that each op gets; here only the structure is known.
  constexpr int64_t kUnbounded = std::numeric_limits<int32_t>::max();
  RETURN_IF_ERROR(batch.Validate(kUnbounded, kUnbounded));
  return std::unique_ptr<ops::BatchPlan>(new CpuBatchPlan(batch));
}

absl::Status CpuOps::Copy(TensorView src, TensorView dst) { return cpu::Copy(context_, src, dst); }
absl::StatusOr<double> CpuOps::SumSquares(TensorView x) { return cpu::SumSquares(context_, x); }
absl::Status CpuOps::Embedding(const ops::EmbeddingParams& p) {
  return cpu::Embedding(context_, p);
}
absl::Status CpuOps::GatherRows(const ops::GatherRowsParams& p) {
  return cpu::GatherRows(context_, p);
}
absl::Status CpuOps::RmsNorm(const ops::RmsNormParams& p) { return cpu::RmsNorm(context_, p); }
absl::Status CpuOps::MatMul(const ops::MatMulParams& p) { return cpu::MatMul(context_, p); }
absl::Status CpuOps::QkNormRope(const ops::QkNormRopeParams& p) {
  return cpu::QkNormRope(context_, p);
}
absl::Status CpuOps::TreeAttention(const ops::TreeAttentionParams& p) {
  return cpu::TreeAttention(context_, p);
}
absl::Status CpuOps::SwiGlu(const ops::SwiGluParams& p) { return cpu::SwiGlu(context_, p); }
absl::Status CpuOps::LogProbHead(const ops::LogProbHeadParams& p) {
  return cpu::LogProbHead(context_, p);
}
absl::Status CpuOps::EmbeddingBackward(const ops::EmbeddingBackwardParams& p) {
  return cpu::EmbeddingBackward(context_, p);
}
absl::Status CpuOps::ScatterAddRows(const ops::ScatterAddRowsParams& p) {
  return cpu::ScatterAddRows(context_, p);
}
absl::Status CpuOps::RmsNormBackward(const ops::RmsNormBackwardParams& p) {
  return cpu::RmsNormBackward(context_, p);
}
absl::Status CpuOps::SumRows(const ops::SumRowsParams& p) { return cpu::SumRows(context_, p); }
absl::Status CpuOps::QkNormRopeBackward(const ops::QkNormRopeBackwardParams& p) {
  return cpu::QkNormRopeBackward(context_, p);
}
absl::Status CpuOps::TreeAttentionBackward(const ops::TreeAttentionBackwardParams& p) {
  return cpu::TreeAttentionBackward(context_, p);
}
absl::Status CpuOps::SwiGluBackward(const ops::SwiGluBackwardParams& p) {
  return cpu::SwiGluBackward(context_, p);
}
absl::Status CpuOps::LogProbHeadBackward(const ops::LogProbHeadBackwardParams& p) {
  return cpu::LogProbHeadBackward(context_, p);
}
absl::StatusOr<std::unique_ptr<ops::PendingSample>> CpuOps::StartSample(
    const ops::SampleParams& p) {
  return cpu::StartSample(context_, p);
}
absl::Status CpuOps::CopyBlocks(const ops::CopyBlocksParams& p) {
  return cpu::CopyBlocks(context_, p);
}
absl::Status CpuOps::AdamW(const ops::AdamWParams& p) { return cpu::AdamW(context_, p); }

}  // namespace coppice::cpu
