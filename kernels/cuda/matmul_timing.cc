#include "kernels/cuda/matmul_timing.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/matmul_contest.h"
#include "kernels/cuda/timeline.h"

namespace coppice::cuda {
namespace {

constexpr int kMaxRuns = 256;  // of a turn
// What drives operands out of the second-level cache.
constexpr int64_t kTrafficBytes = int64_t{128} << 20;

// 0 where an algorithm does not have it.
template <typename T>
int64_t Attribute(const cublasLtMatmulAlgo_t& algo, cublasLtMatmulAlgoConfigAttributes_t name) {
  T value = 0;
  size_t written = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoConfigGetAttribute(&algo, name, &value, sizeof(value), &written);
  return status == CUBLAS_STATUS_SUCCESS && written == sizeof(value) ? int64_t{value} : 0;
}

// Runs of one candidate, marked one by one.
class Turns {
 public:
  Turns(Context& context, const Rehearsal& rehearsal)
      : context_(context), timeline_(context), rehearsal_(rehearsal) {}

  // As MeasureCandidate wants it.
  absl::StatusOr<double> Measure(const cublasLtMatmulAlgo_t& algo, double seconds) {
    ASSIGN_OR_RETURN(const double one, Run(algo, 1));
    if (one == kNever || seconds == 0) return one;
    return Run(algo, static_cast<int>(std::clamp<double>(seconds / one, 1, kMaxRuns)));
  }

 private:
  static constexpr double kNever = std::numeric_limits<double>::infinity();

  absl::Status PushOutOperands() {
    if (rehearsal_.operand_bytes >= 2 * kTrafficBytes || rehearsal_.spare_bytes < kTrafficBytes) {
      return absl::OkStatus();
    }
    return context_.Check(cudaMemsetAsync(rehearsal_.spare, 0, kTrafficBytes, context_.stream()),
                          "memset");
  }

  absl::StatusOr<double> Run(const cublasLtMatmulAlgo_t& algo, int runs) {
    for (int i = 0; i < runs; ++i) {
      RETURN_IF_ERROR(PushOutOperands());
      RETURN_IF_ERROR(timeline_.Mark());
      const cublasStatus_t status = rehearsal_.run(algo);
      RETURN_IF_ERROR(timeline_.Mark());
      if (status != CUBLAS_STATUS_SUCCESS) {
        RETURN_IF_ERROR(timeline_.Take().status());
        return kNever;
      }
    }
    ASSIGN_OR_RETURN(const std::vector<double> marks, timeline_.Take());
    double total = 0;
    for (size_t i = 0; i < marks.size(); i += 2) total += marks[i + 1] - marks[i];
    return total / runs;
  }

  Context& context_;
  CudaTimeline timeline_;
  const Rehearsal& rehearsal_;
};

}  // namespace

std::string AlgorithmName(const cublasLtMatmulAlgo_t& algo) {
  return absl::StrCat("id", Attribute<int32_t>(algo, CUBLASLT_ALGO_CONFIG_ID), ".tile",
                      Attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_TILE_ID), ".stages",
                      Attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_STAGES_ID), ".split",
                      Attribute<int32_t>(algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM), ".sum",
                      Attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME), ".swizzle",
                      Attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING)) +
         absl::StrCat(".custom", Attribute<uint32_t>(algo, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION),
                      ".inner", Attribute<uint16_t>(algo, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID),
                      ".cluster", Attribute<uint16_t>(algo, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID));
}

MatMulChoice ChoiceOf(const cublasLtMatmulAlgo_t& algo) {
  MatMulChoice choice = {.algorithm = AlgorithmName(algo)};
  static_assert(sizeof(algo) == sizeof(choice.words));
  std::memcpy(choice.words.data(), &algo, sizeof(algo));
  return choice;
}

cublasLtMatmulAlgo_t AlgorithmOf(const MatMulChoice& choice) {
  cublasLtMatmulAlgo_t algo = {};
  std::memcpy(&algo, choice.words.data(), sizeof(algo));
  return algo;
}

absl::StatusOr<MatMulChoice> TimeCandidates(Context& context,
                                            const std::vector<cublasLtMatmulAlgo_t>& candidates,
                                            const Rehearsal& rehearsal) {
  Turns turns(context, rehearsal);
  ASSIGN_OR_RETURN(const Contest contest,
                   HoldContest(static_cast<int>(candidates.size()), [&](int i, double seconds) {
                     return turns.Measure(candidates[i], seconds);
                   }));
  MatMulChoice choice = ChoiceOf(candidates[contest.winner]);
  choice.first_us = 1e6 * contest.first_seconds;
  choice.chosen_us = 1e6 * contest.winner_seconds;
  return choice;
}

}  // namespace coppice::cuda
