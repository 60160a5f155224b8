#include "kernels/cuda/matmul_cache.h"

#include <algorithm>
#include <iterator>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/log.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"

namespace coppice::cuda {
namespace {

constexpr int kCandidates = 32;
// Among which the clock chooses.
constexpr int kTimedCandidates = 8;
// Of a product worth timing, a few microseconds.
constexpr double kMinTimedFlops = 4e9;
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

// At most so many of the library's candidates for this very shape, best first. `whole_k`: none that
// splits k.
std::vector<cublasLtMatmulAlgo_t> Candidates(cublasLtHandle_t blas, const MatMulShape& s,
                                             const MatMulCache::Entry& e, bool whole_k,
                                             int max_candidates) {
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulPreferenceCreate(&preference);
  const auto set = [preference](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value));
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(Context::kWorkspaceBytes));
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    set(attribute, static_cast<uint32_t>(s.alignment));
  }
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, ReductionSchemes(s, whole_k));
  cublasLtMatmulHeuristicResult_t results[kCandidates] = {};
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      blas, e.desc, e.a, e.b, e.c, e.d, preference, max_candidates, results, &found);
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

bool Runs(cublasLtHandle_t blas, const MatMulCache::Entry& e, const cublasLtMatmulAlgo_t& algo) {
  cublasLtMatmulHeuristicResult_t result = {};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(blas, e.desc, e.a, e.b, e.c, e.d, &algo, &result);
  return status == CUBLAS_STATUS_SUCCESS &&
         result.workspaceSize <= static_cast<size_t>(Context::kWorkspaceBytes);
}
bool Runs(cublasLtHandle_t blas, const MatMulShape& shape, const cublasLtMatmulAlgo_t& algo) {
  const MatMulCache::Entry e = Describe(shape);
  const bool runs = Runs(blas, e, algo);
  Destroy(e);
  return runs;
}

// One algorithm for all products that differ from `shape` in m alone. It sums over k in one order,
// whatever the row, so a row's bits depend on nothing but the row.
std::optional<cublasLtMatmulAlgo_t> FindForEveryM(cublasLtHandle_t blas, MatMulShape shape) {
  shape.m = kReferenceRows;
  const MatMulCache::Entry reference = Describe(shape);
  const std::vector<cublasLtMatmulAlgo_t> candidates =
      Candidates(blas, shape, reference, /*whole_k=*/true, kCandidates);
  Destroy(reference);
  for (const cublasLtMatmulAlgo_t& algo : candidates) {
    const bool serves = !SplitsK(algo) &&
                        std::all_of(std::begin(kProbedRows), std::end(kProbedRows), [&](int64_t m) {
                          shape.m = m;
                          return Runs(blas, shape, algo);
                        });
    if (serves) return algo;
  }
  return std::nullopt;
}

// The least number of rows that counts as so many, of `steps` numbers to a doubling.
std::string LeastAlike(int64_t rows, int64_t steps) {
  int64_t step = 1;
  while (rows / step >= 2 * steps) step *= 2;
  return absl::StrCat(rows / step * step, "+");
}

// What products have in common that run by one choice: all but strides and some rows. Rows of a
// weight gradient are its k, of which only the length of sums depends; m is tiles of the device,
// where another number may favour another algorithm: one more reason to ask for the library's own
// choice.
std::string KindOf(const MatMulShape& s, const cublasLtMatmulAlgo_t& first) {
  const std::string m = s.trans_a ? absl::StrCat(s.m) : LeastAlike(s.m, 8);
  const std::string k = s.trans_a ? LeastAlike(s.k, 4) : absl::StrCat(s.k);
  return absl::StrCat("type=", Name(s.type), " c=", Name(s.c_type), " trans=", int{s.trans_a},
                      int{s.trans_b}, " m=", m, " n=", s.n, " k=", k, " bias=", int{s.bias},
                      " addend=", int{s.addend}, " align=", s.alignment,
                      " first=", AlgorithmName(first));
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

absl::StatusOr<cublasLtMatmulAlgo_t> MatMulCache::ChooseByClock(Context& context,
                                                                const MatMulShape& shape,
                                                                const Entry& entry,
                                                                const Rehearse& rehearse) {
  const auto candidates = [&](int max_candidates) {
    return Candidates(context.blas(), shape, entry, /*whole_k=*/false, max_candidates);
  };
  const std::vector<cublasLtMatmulAlgo_t> own = candidates(1);
  if (own.empty()) return NoAlgorithm(shape);
  const std::string kind = KindOf(shape, own[0]);
  const MatMulChoice* choice = choices_->Find(kind);
  if (choice == nullptr && choices_->takes_more()) {
    const Rehearsal rehearsal = rehearse(entry);
    MatMulChoice timed = ChoiceOf(own[0]);
    if (rehearsal.run != nullptr) {
      ASSIGN_OR_RETURN(timed, TimeCandidates(context, candidates(kTimedCandidates), rehearsal));
    }
    LOG(INFO) << "matmul_timed " << kind << " first_us=" << timed.first_us
              << " chosen_us=" << timed.chosen_us << " chosen=" << timed.algorithm;
    choice = choices_->Keep(kind, timed);
  }
  if (choice == nullptr) return own[0];
  const cublasLtMatmulAlgo_t chosen = AlgorithmOf(*choice);
  return Runs(context.blas(), entry, chosen) ? chosen : own[0];
}

std::optional<cublasLtMatmulAlgo_t> MatMulCache::ChooseForEveryM(cublasLtHandle_t blas,
                                                                 const MatMulShape& shape) {
  MatMulShape any = shape;
  any.m = 0;
  const auto [found, is_new] = for_every_m_.try_emplace(any.Key());
  if (is_new) found->second = FindForEveryM(blas, shape);
  if (found->second && Runs(blas, shape, *found->second)) return found->second;
  return std::nullopt;
}

absl::StatusOr<cublasLtMatmulAlgo_t> MatMulCache::Choose(Context& context, const MatMulShape& shape,
                                                         const Entry& entry,
                                                         const Rehearse& rehearse) {
  const double flops = 2.0 * static_cast<double>(shape.m * shape.n) * static_cast<double>(shape.k);
  if (choices_ != nullptr && flops >= kMinTimedFlops) {
    return ChooseByClock(context, shape, entry, rehearse);
  }
  std::optional<cublasLtMatmulAlgo_t> algo;
  if (context.deterministic() && !shape.trans_a) {  // trans_a: rows of activations are summed over
    algo = ChooseForEveryM(context.blas(), shape);
  } else {
    const bool whole_k = context.deterministic();
    const auto candidates =
        Candidates(context.blas(), shape, entry, whole_k, whole_k ? kCandidates : 1);
    if (!candidates.empty()) algo = candidates[0];
  }
  if (!algo) return NoAlgorithm(shape);
  return *algo;
}

absl::StatusOr<const MatMulCache::Entry*> MatMulCache::Find(Context& context,
                                                            const MatMulShape& shape,
                                                            const Rehearse& rehearse) {
  const auto found = entries_.find(shape.Key());
  if (found != entries_.end()) return &found->second;
  Entry entry = Describe(shape);
  const absl::StatusOr<cublasLtMatmulAlgo_t> algo = Choose(context, shape, entry, rehearse);
  if (!algo.ok()) {
    Destroy(entry);
    return algo.status();
  }
  entry.algo = *algo;
  return &entries_.emplace(shape.Key(), entry).first->second;
}

}  // namespace coppice::cuda
