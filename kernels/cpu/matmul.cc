// Matrix products by oneDNN (dnnl_sgemm: row-major, any leading dimensions), with bias and addend
// as its starting value. Also SumRows, the gradient of a bias.
#include <dnnl.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/column_sums.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

absl::Status CheckMatMul(const ops::MatMulParams& p, int64_t m, int64_t n, int64_t k) {
  ops::ShapeCheck check("matmul");
  check.Rank("a", p.a, 2).Rank("b", p.b, 2);
  p.trans_a ? check.Tensor("a", p.a, DType::kF32, {k, m})
            : check.Tensor("a", p.a, DType::kF32, {m, k});
  p.trans_b ? check.Tensor("b", p.b, DType::kF32, {n, k})
            : check.Tensor("b", p.b, DType::kF32, {k, n});
  return check.Optional("bias", p.bias, DType::kF32, {n})
      .Optional("addend", p.addend, DType::kF32, {m, n})
      .Tensor("c", p.c, DType::kF32, {m, n})
      .status();
}

// c = bias + addend, whichever are present.
void StartFrom(Context& context, const ops::MatMulParams& p) {
  const int64_t n = p.c.dim(1);
  ParallelRanges(context, p.c.dim(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* c = p.c.f32() + i * p.c.stride[0];
      const float* first =
          p.addend.present() ? p.addend.f32() + i * p.addend.stride[0] : p.bias.f32();
      if (first != c) std::memcpy(c, first, n * sizeof(float));
      if (p.addend.present() && p.bias.present()) SimdKernels().add(p.bias.f32(), c, n);
    }
  });
}

// One k range of A B^T, by items of rows and columns that share what they read: a block of A stays
// in the L2 cache while B passes through L1.
void DotGemmInParallel(Context& context, const DotGemmArgs& g) {
  int64_t rows = 96, cols = 96;
  const auto num_items = [&] { return ((g.m + rows - 1) / rows) * ((g.n + cols - 1) / cols); };
  while (num_items() < 4 * context.num_threads() && cols > 24) cols /= 2;
  while (num_items() < 4 * context.num_threads() && rows > 24) rows /= 2;
  const int64_t row_blocks = (g.m + rows - 1) / rows;
  ParallelFor(context, num_items(), [&](int64_t item, int) {
    const int64_t row = item % row_blocks * rows, col = item / row_blocks * cols;
    DotGemmArgs block = g;
    block.m = std::min(rows, g.m - row);
    block.n = std::min(cols, g.n - col);
    block.a += row * g.a_row;
    block.b += col * g.b_row;
    block.c += row * g.c_row + col;
    SimdKernels().dot_gemm(block);
  });
}

void MultiplyTransposed(Context& context, const GemmArgs& g) {
  // Rows of the two blocks in registers fit the L1 cache up to this depth. The cut depends on k
  // alone.
  constexpr int64_t kMaxDepth = 768;
  const int64_t parts = (g.k + kMaxDepth - 1) / kMaxDepth;
  const int64_t depth = ((g.k + parts - 1) / parts + 15) / 16 * 16;
  for (int64_t p = 0; p < g.k; p += depth) {
    DotGemmInParallel(context, {.m = g.m,
                                .n = g.n,
                                .k = std::min(depth, g.k - p),
                                .a = g.a + p,
                                .a_row = g.a_row,
                                .b = g.b + p,
                                .b_row = g.b_row,
                                .c = g.c,
                                .c_row = g.c_row,
                                .accumulate = g.accumulate || p > 0});
  }
}

// Blocks of C, each by one single-threaded dnnl_sgemm.
absl::Status MultiplyByOneDnn(Context& context, const GemmArgs& g) {
  int64_t rows = g.m, cols = g.n;
  const auto num_items = [&] { return ((g.m + rows - 1) / rows) * ((g.n + cols - 1) / cols); };
  while (num_items() < 2 * context.num_threads() && std::max(rows, cols) > 64) {
    int64_t& longer = rows > cols ? rows : cols;
    longer = (longer + 1) / 2;
  }
  const int64_t row_blocks = (g.m + rows - 1) / rows;
  std::atomic<int> failure = dnnl_success;
  ParallelFor(context, num_items(), [&](int64_t item, int) {
    const int64_t row = item % row_blocks * rows, col = item / row_blocks * cols;
    omp_set_num_threads(1);  // of the calling thread; oneDNN asks OpenMP
    const dnnl_status_t status =
        dnnl_sgemm(g.trans_a ? 'T' : 'N', g.trans_b ? 'T' : 'N', std::min(rows, g.m - row),
                   std::min(cols, g.n - col), g.k, 1.0f, g.a + row * (g.trans_a ? 1 : g.a_row),
                   g.a_row, g.b + col * (g.trans_b ? g.b_row : 1), g.b_row,
                   g.accumulate ? 1.0f : 0.0f, g.c + row * g.c_row + col, g.c_row);
    if (status != dnnl_success) failure = status;
  });
  if (failure == dnnl_success) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("oneDNN sgemm failed: want status 0, got ",
                                          failure.load(), " for m=", g.m, " n=", g.n, " k=", g.k,
                                          "; report this shape"));
}

}  // namespace

absl::Status Gemm(Context& context, const GemmArgs& g) {
  if (g.m == 0 || g.n == 0) return absl::OkStatus();
  if (g.k == 0) {
    for (int64_t i = 0; !g.accumulate && i < g.m; ++i) {
      std::memset(g.c + i * g.c_row, 0, g.n * sizeof(float));
    }
    return absl::OkStatus();
  }
  if (g.trans_a || !g.trans_b) return MultiplyByOneDnn(context, g);
  MultiplyTransposed(context, g);
  return absl::OkStatus();
}

namespace {

// A weight gradient in bf16: the product and what it is added to in f32, then rounded once.
absl::Status MatMulIntoBf16(Context& context, ops::MatMulParams p, int64_t m, int64_t n) {
  std::vector<float> sums(m * n);
  const TensorView c = p.c, sum = View2D(sums.data(), DType::kF32, m, n);
  if (p.addend.present()) {
    RETURN_IF_ERROR(Copy(context, p.addend, sum));
    p.addend = sum;
  }
  p.c = sum;
  RETURN_IF_ERROR(MatMul(context, p));
  return Copy(context, sum, c);
}

}  // namespace

absl::Status MatMul(Context& context, const ops::MatMulParams& p) {
  const int64_t m = p.trans_a ? p.a.dim(1) : p.a.dim(0);
  const int64_t k = p.trans_a ? p.a.dim(0) : p.a.dim(1);
  const int64_t n = p.trans_b ? p.b.dim(0) : p.b.dim(1);
  if (p.c.dtype == DType::kBF16 && p.trans_a) return MatMulIntoBf16(context, p, m, n);
  RETURN_IF_ERROR(CheckMatMul(p, m, n, k));
  const bool accumulate = p.bias.present() || p.addend.present();
  const bool in_place = p.addend.data == p.c.data && p.addend.stride[0] == p.c.stride[0];
  if (accumulate && !(in_place && !p.bias.present())) StartFrom(context, p);
  return Gemm(context, {.trans_a = p.trans_a,
                        .trans_b = p.trans_b,
                        .m = m,
                        .n = n,
                        .k = k,
                        .a = p.a.f32(),
                        .a_row = LeadingDimension(p.a),
                        .b = p.b.f32(),
                        .b_row = LeadingDimension(p.b),
                        .c = p.c.f32(),
                        .c_row = LeadingDimension(p.c),
                        .accumulate = accumulate});
}

absl::Status SumRows(Context& context, const ops::SumRowsParams& p) {
  const int64_t rows = p.x.dim(0), n = p.out.dim(0);
  RETURN_IF_ERROR(ops::ShapeCheck("sum_rows")
                      .Tensor("out", p.out, DType::kF32, {n})
                      .Tensor("x", p.x, DType::kF32, {rows, n})
                      .status());
  SumOverRows(context, rows, n, p.out.f32(), [&](int64_t begin, int64_t end, float* partial) {
    for (int64_t i = begin; i < end; ++i)
      SimdKernels().add(p.x.f32() + i * p.x.stride[0], partial, n);
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
