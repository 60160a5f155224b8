// Rows of tables: embedding, gather, and their transposes. A row is one memcpy or one vector
// addition.
#include <algorithm>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

constexpr int64_t kGrainRows = 64;

absl::Status CheckIndices(absl::string_view op, absl::string_view name, const TensorView& indices,
                          int64_t limit) {
  const int32_t* begin = indices.i32();
  for (int64_t i = 0; i < indices.dim(0); ++i) {
    if (begin[i] < 0 || begin[i] >= limit) {
      return ops::ShapeCheck(op)
          .That(false, name, absl::StrCat("an index in [0, ", limit, ")"), begin[i])
          .status();
    }
  }
  return absl::OkStatus();
}

float* Row(const TensorView& t, int64_t row) { return t.f32() + row * t.stride[0]; }

// out[i] = src[indices[i]]
void CopyIndexedRows(Context& context, const TensorView& src, const TensorView& indices,
                     const TensorView& out) {
  ParallelRanges(context, out.dim(0), kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(Row(out, i), Row(src, indices.i32()[i]), out.dim(1) * sizeof(float));
    }
  });
}

}  // namespace

absl::Status Embedding(Context& context, const ops::EmbeddingParams& p) {
  const int64_t rows = p.ids.dim(0), hidden = p.table.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("embedding")
                      .Tensor("ids", p.ids, DType::kI32, {rows})
                      .Tensor("table", p.table, DType::kF32, {p.table.dim(0), hidden})
                      .Tensor("out", p.out, DType::kF32, {rows, hidden})
                      .status());
  RETURN_IF_ERROR(CheckIndices("embedding", "ids", p.ids, p.table.dim(0)));
  CopyIndexedRows(context, p.table, p.ids, p.out);
  return absl::OkStatus();
}

absl::Status GatherRows(Context& context, const ops::GatherRowsParams& p) {
  const int64_t n = p.indices.dim(0), hidden = p.src.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("gather_rows")
                      .Tensor("src", p.src, DType::kF32, {p.src.dim(0), hidden})
                      .Tensor("indices", p.indices, DType::kI32, {n})
                      .Tensor("out", p.out, DType::kF32, {n, hidden})
                      .status());
  RETURN_IF_ERROR(CheckIndices("gather_rows", "indices", p.indices, p.src.dim(0)));
  CopyIndexedRows(context, p.src, p.indices, p.out);
  return absl::OkStatus();
}

absl::Status EmbeddingBackward(Context& context, const ops::EmbeddingBackwardParams& p) {
  const int64_t rows = p.ids.dim(0), hidden = p.d_table.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("embedding_backward")
                      .Tensor("ids", p.ids, DType::kI32, {rows})
                      .Tensor("d_out", p.d_out, DType::kF32, {rows, hidden})
                      .Tensor("d_table", p.d_table, DType::kF32, {p.d_table.dim(0), hidden})
                      .status());
  RETURN_IF_ERROR(CheckIndices("embedding_backward", "ids", p.ids, p.d_table.dim(0)));
  // Equal ids meet in one worker, which sees the rows in ascending order.
  const int workers = context.num_threads();
  ParallelFor(context, workers, [&](int64_t worker, int) {
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t id = p.ids.i32()[i];
      if (id % workers == worker) SimdKernels().add(Row(p.d_out, i), Row(p.d_table, id), hidden);
    }
  });
  return absl::OkStatus();
}

absl::Status ScatterAddRows(Context& context, const ops::ScatterAddRowsParams& p) {
  const int64_t n = p.indices.dim(0), hidden = p.dst.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("scatter_add_rows")
                      .Tensor("src", p.src, DType::kF32, {n, hidden})
                      .Tensor("indices", p.indices, DType::kI32, {n})
                      .Tensor("dst", p.dst, DType::kF32, {p.dst.dim(0), hidden})
                      .status());
  RETURN_IF_ERROR(CheckIndices("scatter_add_rows", "indices", p.indices, p.dst.dim(0)));
  ParallelRanges(context, n, kGrainRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      SimdKernels().add(Row(p.src, i), Row(p.dst, p.indices.i32()[i]), hidden);
    }
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
