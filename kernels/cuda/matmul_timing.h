// How long a product takes by each of several algorithms of cuBLASLt, on the operands that it is
// about to run on, and the choice that follows (matmul_contest.h, matmul_choices.h).
#pragma once

#include <cublasLt.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/matmul_choices.h"

namespace coppice::cuda {

// What the library tells of an algorithm: kernel, tile, stages and so on, by its numbers.
std::string AlgorithmName(const cublasLtMatmulAlgo_t& algo);

// There and back; not timed.
MatMulChoice ChoiceOf(const cublasLtMatmulAlgo_t& algo);
cublasLtMatmulAlgo_t AlgorithmOf(const MatMulChoice& choice);

// A product that can be repeated.
struct Rehearsal {
  // Queues it once, by an algorithm that runs it or not, without a trace in what others read; null
  // if its results are in the way.
  std::function<cublasStatus_t(const cublasLtMatmulAlgo_t&)> run;
  int64_t operand_bytes = 0;  // that a run reads or writes
  // Memory that nobody needs now, maybe none.
  char* spare = nullptr;
  int64_t spare_bytes = 0;
};

// A product whose operands the second-level cache could hold is timed behind other memory traffic,
// if there is spare memory for it: other kernels run between two such products. Errors: those of
// the device. Waits for the stream. Cost: see HoldContest.
absl::StatusOr<MatMulChoice> TimeCandidates(Context& context,
                                            const std::vector<cublasLtMatmulAlgo_t>& candidates,
                                            const Rehearsal& rehearsal);

}  // namespace coppice::cuda
