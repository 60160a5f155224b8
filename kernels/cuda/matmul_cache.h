// MatMulCache: for each shape of product, cuBLASLt's descriptors and the algorithm that its
// heuristic chose; looked up by everything the choice depends on. Owner: Context. Cost of a miss:
// about 0.1 ms on the host.
//
// Deterministic: one algorithm serves every m of otherwise equal products, one that its heuristic
// offers for many rows and that does not split k. Slow for few rows, but a row's bits are its own.
#pragma once

#include <cublasLt.h>

#include <array>
#include <cstdint>
#include <optional>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "kernels/base/dtype.h"

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

  MatMulCache() = default;
  ~MatMulCache();
  MatMulCache(const MatMulCache&) = delete;
  MatMulCache& operator=(const MatMulCache&) = delete;

  // UNIMPLEMENTED if the library has no algorithm.
  absl::StatusOr<const Entry*> Find(cublasLtHandle_t blas, const MatMulShape& shape,
                                    bool deterministic, int64_t workspace_bytes);

 private:
  using Key = std::array<int64_t, 12>;

  std::optional<cublasLtMatmulAlgo_t> Choose(cublasLtHandle_t blas, const MatMulShape& shape,
                                             const Entry& entry, bool deterministic,
                                             int64_t workspace_bytes);

  absl::flat_hash_map<Key, Entry> entries_;
  absl::flat_hash_map<Key, std::optional<cublasLtMatmulAlgo_t>> for_every_m_;  // keys with m = 0
};

}  // namespace coppice::cuda
