// Tree attention: checks, the plan's schedule, scratch, and the launchers of attention/.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/attention/tree_attention.h"
#include "kernels/cuda/batch_plan.h"
#include "kernels/cuda/families.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cuda {
namespace {

// Heads of a row side by side, rows at 16-byte boundaries: what the kernels want of q, k, v, out
// and their gradients.
void CheckRows(ops::ShapeCheck& check, absl::string_view name, const TensorView& t,
               const AttentionShape& shape, int64_t heads) {
  check.Tensor(name, t, shape.dtype, {shape.rows, heads, shape.head_dim})
      .That(heads <= 1 || t.stride[1] == shape.head_dim, name, "heads side by side", t.stride[1])
      .That(shape.rows <= 1 || t.stride[0] % 8 == 0, name, "a row stride that is a multiple of 8",
            t.stride[0])
      .That(reinterpret_cast<uintptr_t>(t.data) % 16 == 0, name, "memory at a 16-byte boundary", 0);
}

// What both directions read, given as `p`.
template <typename Params>
absl::StatusOr<AttentionShape> CheckInputs(const Context& context, absl::string_view op,
                                           const Params& p) {
  RETURN_IF_ERROR(
      ops::ShapeCheck(op)
          .That(p.plan != nullptr, "plan", "a batch plan", 0)
          .That(p.scale > 0, "scale", "a positive number", static_cast<int64_t>(p.scale))
          .Rank("q", p.q, 3)
          .Rank("k", p.k, 3)
          .status());
  const AttentionShape shape = {.rows = p.plan->batch().num_rows(),
                                .q_heads = static_cast<int32_t>(p.q.dim(1)),
                                .kv_heads = static_cast<int32_t>(p.k.dim(1)),
                                .head_dim = static_cast<int32_t>(p.q.dim(2)),
                                .scale = p.scale,
                                .dtype = context.compute_dtype()};
  const int64_t q_heads = shape.q_heads, kv_heads = shape.kv_heads;
  ops::ShapeCheck check(op);
  CheckRows(check, "q", p.q, shape, q_heads);
  CheckRows(check, "k", p.k, shape, kv_heads);
  CheckRows(check, "v", p.v, shape, kv_heads);
  check.That(kv_heads > 0 && q_heads % kv_heads == 0, "q_heads", "a multiple of kv_heads", q_heads);
  check.That(q_heads <= kv_heads * kChunkRows, "q_heads", "at most 64 for each KV head", q_heads);
  if (const int64_t last_block = CudaPlan(p.plan).max_context_block(); last_block >= 0) {
    const int64_t blocks = p.context.k.dim(0), tokens = p.plan->batch().block_tokens;
    check.Dense("context.k", p.context.k, shape.dtype, {blocks, tokens, kv_heads, shape.head_dim})
        .Dense("context.v", p.context.v, shape.dtype, {blocks, tokens, kv_heads, shape.head_dim})
        .That(last_block < blocks, "context block", "below the blocks of context.k", last_block);
  }
  RETURN_IF_ERROR(check.status());
  return shape;
}

RowMatrix Rows(const TensorView& t) {
  return {t.data, t.dim(0) > 1 ? t.stride[0] : t.dim(1) * t.dim(2)};
}

ContextPages Pages(const ops::PagedKv& context, const ops::BatchPlan& plan) {
  return {context.k.data, context.v.data, context.k.dim(0), plan.batch().block_tokens};
}

// Heads of a round that go together at least: with fewer, multiprocessors run out of work.
int32_t LeastHeads(int32_t kv_heads) { return (kv_heads + 3) / 4; }

// Of dS in a round, so that that many heads take a quarter of kRoundScoresBytes.
int64_t RoundBytes(int32_t kv_heads) {
  return kRoundScoresBytes / 4 * kv_heads / LeastHeads(kv_heads);
}

absl::StatusOr<const CudaBatchPlan::Attention*> ScheduleFor(const Context& context,
                                                            const ops::BatchPlan* plan,
                                                            const AttentionShape& shape,
                                                            bool backward) {
  // What stores or reads KV is generation, or training behind a prompt of its own: there a row's
  // sums follow its keys' positions alone.
  const ops::TokenBatch& batch = plan->batch();
  const bool invariant = !backward && context.deterministic() &&
                         (!batch.kv_slots.empty() || !batch.context_nodes.empty());
  const int capability = context.compute_capability();
  const bool tiles = HasTileKernels(shape.head_dim, capability);
  const int32_t shared_bytes = tiles ? 0 : PortableSharedBytes(shape.head_dim);
  if (shared_bytes > context.block_shared_bytes()) {
    return absl::UnimplementedError(
        absl::StrCat("attention of head_dim ", shape.head_dim, ": want ", shared_bytes,
                     " bytes of shared memory for a block, the device has ",
                     context.block_shared_bytes(), "; use another one or --device=cpu"));
  }
  const int64_t round_bytes = tiles ? RoundBytes(shape.kv_heads) : 0;
  return CudaPlan(plan).PlanFor({.tiles = !invariant && tiles,
                                 .stacked = HasStackedKernels(shape.head_dim, capability),
                                 .backward = backward,
                                 .round_images = ImagesOfBytes(shape, round_bytes),
                                 .tile_items = QueryTileItems(shape),
                                 .wave_items = WaveItems(),
                                 .group_size = shape.q_heads / shape.kv_heads,
                                 .kv_heads = shape.kv_heads,
                                 .batch_invariant = invariant,
                                 .decode_slots = DecodeSlots(shape.kv_heads)});
}

absl::Status Launched(Context& context, cudaError_t error, absl::string_view op,
                      const AttentionShape& shape) {
  if (error != cudaErrorNotSupported) return context.Check(error, op);
  return absl::UnimplementedError(
      absl::StrCat(op, ": want a head_dim with kernels (64, 128, 256), got ", shape.head_dim,
                   "; use --device=cpu"));
}

// The workspace, where it holds at least as much of dS as the op takes for itself: LeastHeads of a
// round. Portable kernels keep none.
absl::Status TakeBackwardScratch(Context& context, const TensorView& workspace,
                                 TreeAttentionBackwardArgs& args) {
  const auto bytes_of = [&](int32_t kv_heads) {
    return TreeAttentionBackwardScratchBytes(args.schedule, args.shape, kv_heads);
  };
  const int64_t lent_bytes = workspace.present() ? workspace.num_bytes() : 0;
  int32_t heads = args.portable ? 0 : args.shape.kv_heads;
  const int32_t least = LeastHeads(heads);
  while (heads > least && bytes_of(heads) > lent_bytes) --heads;
  args.scratch_bytes = bytes_of(heads);
  if (args.scratch_bytes <= lent_bytes) {
    args.scratch = workspace.data;
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(args.scratch, context.Scratch(args.scratch_bytes));
  return absl::OkStatus();
}

}  // namespace

absl::Status TreeAttention(Context& context, const ops::TreeAttentionParams& p) {
  constexpr absl::string_view kOp = "tree_attention";
  ASSIGN_OR_RETURN(const AttentionShape shape, CheckInputs(context, kOp, p));
  ops::ShapeCheck check(kOp);
  CheckRows(check, "out", p.out, shape, shape.q_heads);
  if (p.lse.present()) check.Dense("lse", p.lse, DType::kF32, {shape.rows, shape.q_heads});
  RETURN_IF_ERROR(check.status());
  if (shape.rows == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(const CudaBatchPlan::Attention* attention,
                   ScheduleFor(context, p.plan, shape, false));
  TreeAttentionArgs args = {.shape = shape,
                            .schedule = attention->schedule,
                            .q = Rows(p.q),
                            .k = Rows(p.k),
                            .v = Rows(p.v),
                            .context = {},
                            .out = Rows(p.out),
                            .lse = p.lse.f32()};
  if (attention->has_context) {
    args.context = Pages(p.context, *p.plan);
  }
  ASSIGN_OR_RETURN(args.scratch, context.Scratch(TreeAttentionScratchBytes(args.schedule, shape)));
  return Launched(context, LaunchTreeAttention(args, context.stream()), kOp, shape);
}

absl::Status TreeAttentionBackward(Context& context, const ops::TreeAttentionBackwardParams& p) {
  constexpr absl::string_view kOp = "tree_attention_backward";
  ASSIGN_OR_RETURN(const AttentionShape shape, CheckInputs(context, kOp, p));
  ops::ShapeCheck check(kOp);
  for (const auto& [name, t] : {std::pair("out", &p.out), {"d_out", &p.d_out}, {"d_q", &p.d_q}}) {
    CheckRows(check, name, *t, shape, shape.q_heads);
  }
  CheckRows(check, "d_k", p.d_k, shape, shape.kv_heads);
  CheckRows(check, "d_v", p.d_v, shape, shape.kv_heads);
  check.Dense("lse", p.lse, DType::kF32, {shape.rows, shape.q_heads})
      .Optional("workspace", p.workspace, DType::kU8, {p.workspace.dim(0)})
      .That(reinterpret_cast<uintptr_t>(p.workspace.data) % 256 == 0, "workspace",
            "memory at a 256-byte boundary", 0);
  if (CudaPlan(p.plan).max_context_block() >= 0 && p.d_context.k.present()) {
    for (const auto& [name, t] :
         {std::pair("d_context.k", &p.d_context.k), {"d_context.v", &p.d_context.v}}) {
      check.Dense(
          name, *t, DType::kF32,
          {p.context.k.dim(0), p.plan->batch().block_tokens, shape.kv_heads, shape.head_dim});
    }
  }
  RETURN_IF_ERROR(check.status());
  if (shape.rows == 0) return absl::OkStatus();
  ASSIGN_OR_RETURN(const CudaBatchPlan::Attention* attention,
                   ScheduleFor(context, p.plan, shape, true));
  TreeAttentionBackwardArgs args = {.shape = shape,
                                    .schedule = attention->schedule,
                                    .q = Rows(p.q),
                                    .k = Rows(p.k),
                                    .v = Rows(p.v),
                                    .context = {},
                                    .d_context = {},
                                    .out = Rows(p.out),
                                    .lse = p.lse.f32(),
                                    .d_out = Rows(p.d_out),
                                    .d_q = Rows(p.d_q),
                                    .d_k = Rows(p.d_k),
                                    .d_v = Rows(p.d_v),
                                    .rounds = attention->rounds.data()};
  args.portable = !HasTileKernels(shape.head_dim, context.compute_capability());
  if (attention->has_context) {
    args.context = Pages(p.context, *p.plan);
    args.d_context = {p.d_context.k.f32(), p.d_context.v.f32()};
  }
  RETURN_IF_ERROR(TakeBackwardScratch(context, p.workspace, args));
  return Launched(context, LaunchTreeAttentionBackward(args, context.stream()), kOp, shape);
}

}  // namespace coppice::cuda
