// Rows of tables. Indices are on the device and not checked on the host: the kernels never follow
// one outside its table.
#include "kernels/base/status_macros.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/families.h"
#include "kernels/cuda/launchers.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {

absl::Status Embedding(Context& context, const ops::EmbeddingParams& p) {
  const int64_t rows = p.ids.dim(0), hidden = p.table.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("embedding")
                      .Tensor("ids", p.ids, DType::kI32, {rows})
                      .Tensor("table", p.table, context.compute_dtype(), {p.table.dim(0), hidden})
                      .Tensor("out", p.out, DType::kF32, {rows, hidden})
                      .status());
  return context.Check(
      LaunchGatherRows({.src = p.table, .indices = p.ids, .out = p.out}, context.stream()),
      "embedding");
}

absl::Status GatherRows(Context& context, const ops::GatherRowsParams& p) {
  const int64_t n = p.indices.dim(0), hidden = p.src.dim(1);
  const DType dtype = p.src.dtype == DType::kF32 ? DType::kF32 : context.compute_dtype();
  RETURN_IF_ERROR(ops::ShapeCheck("gather_rows")
                      .Tensor("src", p.src, dtype, {p.src.dim(0), hidden})
                      .Tensor("indices", p.indices, DType::kI32, {n})
                      .Tensor("out", p.out, dtype, {n, hidden})
                      .status());
  return context.Check(LaunchGatherRows(p, context.stream()), "gather_rows");
}

absl::Status EmbeddingBackward(Context& context, const ops::EmbeddingBackwardParams& p) {
  const int64_t rows = p.ids.dim(0), hidden = p.d_table.dim(1);
  constexpr int64_t kMaxHidden = 11 * 1024;  // a row of sums in shared memory
  RETURN_IF_ERROR(ops::ShapeCheck("embedding_backward")
                      .Tensor("ids", p.ids, DType::kI32, {rows})
                      .Tensor("d_out", p.d_out, context.compute_dtype(), {rows, hidden})
                      .Tensor("d_table", p.d_table, DType::kF32, {p.d_table.dim(0), hidden})
                      .That(hidden <= kMaxHidden, "hidden", "at most 11264", hidden)
                      .status());
  return context.Check(LaunchEmbeddingBackward(p, context.stream()), "embedding_backward");
}

absl::Status ScatterAddRows(Context& context, const ops::ScatterAddRowsParams& p) {
  const DType type = context.compute_dtype();
  const int64_t n = p.indices.dim(0), hidden = p.dst.dim(1);
  RETURN_IF_ERROR(ops::ShapeCheck("scatter_add_rows")
                      .Tensor("src", p.src, type, {n, hidden})
                      .Tensor("indices", p.indices, DType::kI32, {n})
                      .Tensor("dst", p.dst, type, {p.dst.dim(0), hidden})
                      .status());
  return context.Check(LaunchScatterAddRows(p, context.stream()), "scatter_add_rows");
}

}  // namespace coppice::cuda
