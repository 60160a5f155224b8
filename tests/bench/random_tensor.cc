#include "tests/bench/random_tensor.h"

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/base/status_macros.h"

namespace coppice::bench {

absl::Status FillRandom(ops::Ops& ops, TensorView matrix, float scale, uint64_t seed) {
  constexpr int64_t kBlock = int64_t{8} << 20;  // elements
  const int64_t rows = matrix.dim(0), columns = matrix.dim(1);
  const int64_t block_rows = std::clamp<int64_t>(kBlock / columns, 1, rows);
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<float> uniform(-1.7f * scale, 1.7f * scale);
  std::vector<float> block(block_rows * columns);
  for (float& x : block) x = uniform(random);
  ASSIGN_OR_RETURN(const DeviceBuffer staged,
                   ops.Allocate(static_cast<int64_t>(block.size()) * 4, "random block"));
  const TensorView source = View2D(staged.data(), DType::kF32, block_rows, columns);
  RETURN_IF_ERROR(ops.Upload(block.data(), source));
  for (int64_t row = 0; row < rows; row += block_rows) {
    const int64_t end = std::min(rows, row + block_rows);
    RETURN_IF_ERROR(ops.Copy(source.Rows(0, end - row), matrix.Rows(row, end)));
  }
  return ops.Synchronize();
}

}  // namespace coppice::bench
