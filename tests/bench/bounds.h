// What a step cannot beat, measured in the same run: the rate of the vendor's GEMM on the very
// shapes (oneDNN called directly on the CPU, Ops::MatMul elsewhere), and the bandwidth of memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/model/model_config.h"
#include "kernels/ops/ops.h"

namespace coppice::bench {

// c [m, n] = op(a) op(b), `count` times.
struct GemmShape {
  int64_t m = 0, n = 0, k = 0;
  bool trans_a = false, trans_b = true;
  int64_t count = 1;
  bool f32_out = false;  // whatever the compute dtype: logits and weight gradients
};

// Of one forward pass over `rows` rows of which `head_rows` have logits: the last layer runs its
// second half for those only.
std::vector<GemmShape> ForwardGemms(const ModelConfig& config, int64_t rows, int64_t head_rows);
// Of the two gradients of each forward GEMM.
std::vector<GemmShape> BackwardGemms(const std::vector<GemmShape>& forward);

// Seconds that all of them take, each measured alone.
absl::StatusOr<double> GemmSeconds(ops::Ops& ops, int threads,
                                   const std::vector<GemmShape>& shapes);
// "oneDNN sgemm of the same shapes" or the like, for Result::bound.
std::string GemmBoundName(const ops::Ops& ops);
// "bytes at 21.3 GB/s", for Result::bound.
std::string BandwidthBoundName(double bytes_per_second);
// Bytes that the norm of the gradients and AdamW move: 4 a parameter and 28 (gradient, moments,
// parameter with its master: in; all but the gradient: out).
double UpdateBytes(const ModelConfig& config);
// Bytes a second: reading on the CPU, reading and writing of a copy elsewhere.
absl::StatusOr<double> MemoryBandwidth(ops::Ops& ops, int threads);

}  // namespace coppice::bench
