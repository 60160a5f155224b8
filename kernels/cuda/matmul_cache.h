// MatMulCache: for each shape of product, cuBLASLt's descriptors and the algorithm that its
// heuristic chose; looked up by everything the choice depends on. Owner: Context. Cost of a miss:
// about 0.1 ms on the host.
//
// With choices that grow (matmul_choices.h) the heuristic's best are timed, once for a kind: all
// that differ in their number of rows by an eighth at most (weight gradients: a quarter) and for
// which the heuristic's first choice is the same. Such a miss takes up to a second. Small products
// are not timed.
//
// Deterministic: one algorithm serves every m of otherwise equal products, one that its heuristic
// offers for many rows and that does not split k. Slow for few rows, but a row's bits are its own.
#pragma once

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "kernels/base/dtype.h"
#include "kernels/cuda/matmul_choices.h"
#include "kernels/cuda/matmul_timing.h"

namespace coppice::cuda {

// C = op(A) op(B) (+ bias) (+ addend), row-major, as params.h has it.
struct MatMulShape {
  int64_t m = 0, n = 0, k = 0;
  bool trans_a = false, trans_b = false;
  int64_t a_row = 0, b_row = 0, c_row = 0,
          addend_row = 0;                            // elements from one stored row to the next
  DType type = DType::kBF16, c_type = DType::kBF16;  // of a, b and bias; of c and addend
  bool bias = false, addend = false;
  int alignment = 16;  // of all pointers and rows: 16, 8, 4 or 2 bytes

  std::array<int64_t, 12> Key() const {
    return {m,
            n,
            k,
            int64_t{trans_a} * 2 + trans_b,
            a_row,
            b_row,
            c_row,
            addend_row,
            static_cast<int64_t>(type),
            static_cast<int64_t>(c_type),
            int64_t{bias} * 2 + addend,
            alignment};
  }
};

class MatMulCache {
 public:
  struct Entry {
    cublasLtMatmulDesc_t desc = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr,
                           d = nullptr;  // of the transposed, column-major product
    cublasLtMatmulAlgo_t algo = {};
  };

  // How to repeat the product that is looked up, once it is described; called to time it.
  using Rehearse = std::function<Rehearsal(const Entry&)>;

  // `choices` may be null: nothing is timed.
  explicit MatMulCache(std::unique_ptr<MatMulChoices> choices) : choices_(std::move(choices)) {}
  ~MatMulCache();
  MatMulCache(const MatMulCache&) = delete;
  MatMulCache& operator=(const MatMulCache&) = delete;

  // UNIMPLEMENTED if the library has no algorithm. Other errors: the device's.
  absl::StatusOr<const Entry*> Find(Context& context, const MatMulShape& shape,
                                    const Rehearse& rehearse);

 private:
  using Key = std::array<int64_t, 12>;

  absl::StatusOr<cublasLtMatmulAlgo_t> Choose(Context& context, const MatMulShape& shape,
                                              const Entry& entry, const Rehearse& rehearse);
  absl::StatusOr<cublasLtMatmulAlgo_t> ChooseByClock(Context& context, const MatMulShape& shape,
                                                     const Entry& entry, const Rehearse& rehearse);
  std::optional<cublasLtMatmulAlgo_t> ChooseForEveryM(cublasLtHandle_t blas,
                                                      const MatMulShape& shape);

  std::unique_ptr<MatMulChoices> choices_;
  absl::flat_hash_map<Key, Entry> entries_;
  absl::flat_hash_map<Key, std::optional<cublasLtMatmulAlgo_t>> for_every_m_;  // keys with m = 0
};

}  // namespace coppice::cuda
