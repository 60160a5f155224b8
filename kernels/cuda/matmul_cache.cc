#include "kernels/cuda/matmul_cache.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"

namespace coppice::cuda {
namespace {

constexpr int kCandidates = 32;
// Of a product whose algorithm serves every m: large enough that no kernel for few rows is chosen.
constexpr int64_t kReferenceRows = 1024;
constexpr int64_t kProbedRows[] = {1, 2, 7, 8, 63, 64, 65, 257, kReferenceRows};

void Destroy(const MatMulCache::Entry& e) {
  for (const cublasLtMatrixLayout_t layout : {e.a, e.b, e.c, e.d}) {
    if (layout != nullptr) cublasLtMatrixLayoutDestroy(layout);
  }
  if (e.desc != nullptr) cublasLtMatmulDescDestroy(e.desc);
}

template <typename T>
void Set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, T value) {
  cublasLtMatmulDescSetAttribute(desc, attribute, &value, sizeof(value));
}

// The column-major view of a row-major [rows, cols] matrix.
cublasLtMatrixLayout_t Layout(cudaDataType_t type, int64_t rows, int64_t cols, int64_t row_stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  cublasLtMatrixLayoutCreate(&layout, type, cols, rows, row_stride);
  return layout;
}

cudaDataType_t CudaType(DType type) {
  if (type == DType::kF32) return CUDA_R_32F;
  return type == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
}

MatMulCache::Entry Describe(const MatMulShape& s) {
  const cudaDataType_t in = CudaType(s.type), out = CudaType(s.c_type);
  MatMulCache::Entry e;
  cublasLtMatmulDescCreate(&e.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  Set(e.desc, CUBLASLT_MATMUL_DESC_TRANSA, s.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
  Set(e.desc, CUBLASLT_MATMUL_DESC_TRANSB, s.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (s.bias) {
    Set(e.desc, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    Set(e.desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, in);
  }
  e.a = s.trans_b ? Layout(in, s.n, s.k, s.b_row) : Layout(in, s.k, s.n, s.b_row);
  e.b = s.trans_a ? Layout(in, s.k, s.m, s.a_row) : Layout(in, s.m, s.k, s.a_row);
  e.c = Layout(out, s.m, s.n, s.addend ? s.addend_row : s.c_row);
  e.d = Layout(out, s.m, s.n, s.c_row);
  return e;
}

// How parts of k may be added up. Never rounded to 16 bits in between: the two schemes left out
// hold parts in c's type.
uint32_t ReductionSchemes(const MatMulShape& s, bool whole_k) {
  if (whole_k) return CUBLASLT_REDUCTION_SCHEME_NONE;
  return s.c_type == DType::kF32 ? CUBLASLT_REDUCTION_SCHEME_MASK
                                 : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
}

// The library's candidates for this very shape, best first. `whole_k`: none that splits k.
std::vector<cublasLtMatmulAlgo_t> Candidates(cublasLtHandle_t blas, const MatMulShape& s,
                                             const MatMulCache::Entry& e, bool whole_k,
                                             int64_t workspace_bytes) {
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulPreferenceCreate(&preference);
  const auto set = [preference](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    set(attribute, static_cast<uint32_t>(s.alignment));
  }
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, ReductionSchemes(s, whole_k));
  cublasLtMatmulHeuristicResult_t results[kCandidates] = {};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      blas, e.desc, e.a, e.b, e.c, e.d, preference, whole_k ? kCandidates : 1, results, &found);
  cublasLtMatmulPreferenceDestroy(preference);
  std::vector<cublasLtMatmulAlgo_t> algos;
  for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < found; ++i) {
    algos.push_back(results[i].algo);
  }
  return algos;
}

bool SplitsK(const cublasLtMatmulAlgo_t& algo) {
  int32_t parts = 1;
  size_t written = 0;
  cublasLtMatmulAlgoConfigGetAttribute(&algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &parts,
                                       sizeof(parts), &written);
  return parts != 1 && parts != 0;
}

bool Runs(cublasLtHandle_t blas, const MatMulShape& shape, const cublasLtMatmulAlgo_t& algo,
          int64_t workspace_bytes) {
  const MatMulCache::Entry e = Describe(shape);
  cublasLtMatmulHeuristicResult_t result = {};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(blas, e.desc, e.a, e.b, e.c, e.d, &algo, &result);
  Destroy(e);
  return status == CUBLAS_STATUS_SUCCESS &&
         result.workspaceSize <= static_cast<size_t>(workspace_bytes);
}

// One algorithm for all products that differ from `shape` in m alone. It sums over k in one order,
// whatever the row, so a row's bits depend on nothing but the row.
std::optional<cublasLtMatmulAlgo_t> ChooseForEveryM(cublasLtHandle_t blas, MatMulShape shape,
                                                    int64_t workspace_bytes) {
  shape.m = kReferenceRows;
  const MatMulCache::Entry reference = Describe(shape);
  const std::vector<cublasLtMatmulAlgo_t> candidates =
      Candidates(blas, shape, reference, /*whole_k=*/true, workspace_bytes);
  Destroy(reference);
  for (const cublasLtMatmulAlgo_t& algo : candidates) {
    const bool serves = !SplitsK(algo) &&
                        std::all_of(std::begin(kProbedRows), std::end(kProbedRows), [&](int64_t m) {
                          shape.m = m;
                          return Runs(blas, shape, algo, workspace_bytes);
                        });
    if (serves) return algo;
  }
  return std::nullopt;
}

absl::Status NoAlgorithm(const MatMulShape& s) {
  return absl::UnimplementedError(
      absl::StrCat("matmul: want a product that cublasLt has (bf16 or f16 operands; c in their "
                   "type or f32; bias "
                   "with c in their type), got m=",
                   s.m, " n=", s.n, " k=", s.k, " type=", Name(s.type), " c=", Name(s.c_type),
                   " bias=", s.bias, "; change the types or strides"));
}

}  // namespace

MatMulCache::~MatMulCache() {
  for (const auto& [key, entry] : entries_) Destroy(entry);
}

std::optional<cublasLtMatmulAlgo_t> MatMulCache::Choose(cublasLtHandle_t blas,
                                                        const MatMulShape& shape,
                                                        const Entry& entry, bool deterministic,
                                                        int64_t workspace_bytes) {
  if (!deterministic || shape.trans_a) {  // trans_a: rows of activations are summed over
    const auto candidates = Candidates(blas, shape, entry, deterministic, workspace_bytes);
    return candidates.empty() ? std::nullopt : std::optional(candidates[0]);
  }
  MatMulShape any = shape;
  any.m = 0;
  const auto [found, is_new] = for_every_m_.try_emplace(any.Key());
  if (is_new) found->second = ChooseForEveryM(blas, shape, workspace_bytes);
  if (found->second && Runs(blas, shape, *found->second, workspace_bytes)) return found->second;
  return std::nullopt;
}

absl::StatusOr<const MatMulCache::Entry*> MatMulCache::Find(cublasLtHandle_t blas,
                                                            const MatMulShape& shape,
                                                            bool deterministic,
                                                            int64_t workspace_bytes) {
  const auto found = entries_.find(shape.Key());
  if (found != entries_.end()) return &found->second;
  Entry entry = Describe(shape);
  const std::optional<cublasLtMatmulAlgo_t> algo =
      Choose(blas, shape, entry, deterministic, workspace_bytes);
  if (!algo) {
    Destroy(entry);
    return NoAlgorithm(shape);
  }
  entry.algo = *algo;
  return &entries_.emplace(shape.Key(), entry).first->second;
}

}  // namespace coppice::cuda
