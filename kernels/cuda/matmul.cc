// Matrix products by cuBLASLt. A row-major matrix is its transpose in column-major order, so C =
// op(A) op(B) is asked for as C^T = op(B)^T op(A)^T: the library's first operand is our b, its
// second our a. 16 bits in, f32 sums, 16 bits or f32 out; the bias is an epilogue, the addend the C
// operand with beta = 1. Also SumRows, the gradient of a bias.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/cuda/matmul_cache.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

int64_t RowStride(const TensorView& t) {
  return t.dim(0) > 1 ? t.stride[0] : std::max<int64_t>(t.dim(1), 1);
}

// The largest of 16, 8, 4 that divides the address and the rows of every operand; 2 otherwise.
int CommonAlignment(std::initializer_list<const TensorView*> tensors) {
  uint64_t bits = 16;
  for (const TensorView* t : tensors) {
    if (!t->present()) continue;
    bits |= reinterpret_cast<uintptr_t>(t->data);
    if (t->rank == 2) bits |= static_cast<uint64_t>(RowStride(*t) * SizeOf(t->dtype));
  }
  return static_cast<int>(bits & -bits);
}

MatMulShape ShapeOf(const ops::MatMulParams& p, int64_t m, int64_t n, int64_t k) {
  return {.m = m,
          .n = n,
          .k = k,
          .trans_a = p.trans_a,
          .trans_b = p.trans_b,
          .a_row = RowStride(p.a),
          .b_row = RowStride(p.b),
          .c_row = RowStride(p.c),
          .addend_row = p.addend.present() ? RowStride(p.addend) : 0,
          .type = p.a.dtype,
          .c_type = p.c.dtype,
          .bias = p.bias.present(),
          .addend = p.addend.present(),
          .alignment = CommonAlignment({&p.a, &p.b, &p.c, &p.addend, &p.bias})};
}

// Queues the product; `c` is p.c's memory or takes its place.
cublasStatus_t Queue(Context& context, const ops::MatMulParams& p, const MatMulCache::Entry& entry,
                     const cublasLtMatmulAlgo_t& algo, void* c) {
  if (p.bias.present()) {
    const void* bias = p.bias.data;
    cublasLtMatmulDescSetAttribute(entry.desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias,
                                   sizeof(bias));
  }
  const float alpha = 1, beta = p.addend.present() ? 1.0f : 0.0f;
  return cublasLtMatmul(context.blas(), entry.desc, &alpha, p.b.data, entry.a, p.a.data, entry.b,
                        &beta, p.addend.present() ? p.addend.data : c, entry.c, c, entry.d, &algo,
                        context.workspace(), Context::kWorkspaceBytes, context.stream());
}

// From the first row's first byte to the last row's end.
int64_t SpanBytes(const TensorView& t) {
  return ((t.dim(0) - 1) * RowStride(t) + t.dim(1)) * SizeOf(t.dtype);
}

// Into c, which the product overwrites after all; what is added to itself goes to scratch. Scratch
// is spare unless an operand lies in it: then it is the caller's.
Rehearsal RehearsalOf(Context& context, const ops::MatMulParams& p,
                      const MatMulCache::Entry& entry) {
  Rehearsal rehearsal;
  const char *begin = context.scratch(), *end = begin + context.scratch_bytes();
  bool is_spare = true;
  for (const TensorView* t : {&p.a, &p.b, &p.c, &p.addend}) {
    if (!t->present()) continue;
    rehearsal.operand_bytes += SpanBytes(*t);
    is_spare &= !(begin <= t->data && t->data < end);
  }
  if (is_spare) {
    rehearsal.spare = context.scratch();
    rehearsal.spare_bytes = context.scratch_bytes();
  }
  const bool in_place = p.addend.present() && p.addend.data == p.c.data;
  if (in_place && SpanBytes(p.c) > rehearsal.spare_bytes) return rehearsal;
  void* const c = in_place ? rehearsal.spare : p.c.data;
  rehearsal.run = [&context, &p, &entry, c](const cublasLtMatmulAlgo_t& algo) {
    return Queue(context, p, entry, algo, c);
  };
  return rehearsal;
}

absl::Status CheckMatMul(const ops::MatMulParams& p, DType compute, int64_t m, int64_t n,
                         int64_t k) {
  ops::ShapeCheck check("matmul");
  p.trans_a ? check.Tensor("a", p.a, compute, {k, m}) : check.Tensor("a", p.a, compute, {m, k});
  p.trans_b ? check.Tensor("b", p.b, compute, {n, k}) : check.Tensor("b", p.b, compute, {k, n});
  const DType out = p.c.dtype == DType::kF32 ? DType::kF32 : compute;
  return check.Optional("bias", p.bias, compute, {n})
      .Optional("addend", p.addend, out, {m, n})
      .Tensor("c", p.c, out, {m, n})
      .That(k > 0 || m == 0 || n == 0, "k", "at least 1", k)
      .status();
}

}  // namespace

absl::Status MatMul(Context& context, const ops::MatMulParams& p) {
  RETURN_IF_ERROR(ops::ShapeCheck("matmul").Rank("a", p.a, 2).Rank("b", p.b, 2).status());
  const int64_t m = p.trans_a ? p.a.dim(1) : p.a.dim(0);
  const int64_t k = p.trans_a ? p.a.dim(0) : p.a.dim(1);
  const int64_t n = p.trans_b ? p.b.dim(0) : p.b.dim(1);
  RETURN_IF_ERROR(CheckMatMul(p, context.compute_dtype(), m, n, k));
  if (m == 0 || n == 0) return absl::OkStatus();
  if (FitsSkinny(context, p)) return SkinnyMatMul(context, p);
  ASSIGN_OR_RETURN(const MatMulCache::Entry* entry,
                   context.matmuls().Find(context, ShapeOf(p, m, n, k), [&](const auto& described) {
                     return RehearsalOf(context, p, described);
                   }));
  const cublasStatus_t status = Queue(context, p, *entry, entry->algo, p.c.data);
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  RETURN_IF_ERROR(context.Check(cudaPeekAtLastError(), "matmul"));
  return absl::InternalError(absl::StrCat("cublasLt matmul failed: want status 0, got ",
                                          cublasLtGetStatusName(status), " for m=", m, " n=", n,
                                          " k=", k, "; report this shape"));
}

absl::Status SumRows(Context& context, const ops::SumRowsParams& p) {
  const int64_t rows = p.x.dim(0), n = p.out.dim(0);
  RETURN_IF_ERROR(ops::ShapeCheck("sum_rows")
                      .Tensor("out", p.out, DType::kF32, {n})
                      .Tensor("x", p.x, context.compute_dtype(), {rows, n})
                      .status());
  ASSIGN_OR_RETURN(char* scratch,
                   context.Scratch(NumPartials(rows) * n * static_cast<int64_t>(sizeof(float))));
  return context.Check(LaunchSumRows(p, reinterpret_cast<float*>(scratch), context.stream()),
                       "sum_rows");
}

}  // namespace coppice::cuda
