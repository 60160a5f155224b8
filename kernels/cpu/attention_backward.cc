// Tree attention, backward (Dao et al. 2022, FlashAttention, section 3.1), with p = exp(scale q.k -
// lse):
//   d_v = sum over q of p d_out,   d_s = scale p (d_out.v - delta),  delta = out.d_out,
//   d_q = sum over k of d_s k,     d_k = sum over q of d_s q
//
// Two passes, so that every sum has one owner and one order, without atomics: first d_q with one
// query tile and KV head per item, as in forward; then d_k and d_v with one key tile and KV head
// per item, over the contiguous rows of the keys' subtree (for cached keys: of all segments below
// them) and all query heads of the KV head. The price is that p and d_out.v are computed twice: 7
// products of tiles instead of 5.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/cpu/attention_inputs.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

using ops::TreeAttentionBackwardParams;

absl::Status CheckBackward(const TreeAttentionBackwardParams& p) {
  constexpr absl::string_view kOp = "tree_attention_backward";
  RETURN_IF_ERROR(CheckAttentionInputs(kOp, p.plan, p.q, p.k, p.v, p.context, p.scale));
  const int64_t rows = p.q.dim(0), q_heads = p.q.dim(1), head_dim = p.q.dim(2);
  const int64_t kv_heads = p.k.dim(1);
  ops::ShapeCheck check(kOp);
  check.Tensor("out", p.out, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("lse", p.lse, DType::kF32, {rows, q_heads})
      .Tensor("d_out", p.d_out, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("d_q", p.d_q, DType::kF32, {rows, q_heads, head_dim})
      .Tensor("d_k", p.d_k, DType::kF32, {rows, kv_heads, head_dim})
      .Tensor("d_v", p.d_v, DType::kF32, {rows, kv_heads, head_dim});
  if (CpuPlan(p.plan).max_context_block() >= 0 && p.d_context.k.present()) {
    const int64_t* pages = p.context.k.shape;
    for (const auto& [name, t] :
         {std::pair("d_context.k", p.d_context.k), {"d_context.v", p.d_context.v}}) {
      check.Dense(name, t, DType::kF32, {pages[0], pages[1], pages[2], pages[3]});
    }
  }
  return check.status();
}

// The query side of all rows, grouped by KV head: vector (row, head of the group) of KV head h is
// row (h * rows + row) * group + head of [q_heads * rows, dim].
struct PackedQueries {
  PackedQueries(const TreeAttentionBackwardParams& p, float* memory)
      : rows(p.q.dim(0)),
        group(p.q.dim(1) / p.k.dim(1)),
        dim(PadHeadDim(p.q.dim(2))),
        q(memory),
        d_out(q + p.q.dim(1) * rows * dim),
        lse(d_out + p.q.dim(1) * rows * dim),
        delta(lse + p.q.dim(1) * rows) {}
  static int64_t Size(const TreeAttentionBackwardParams& p) {
    const int64_t vectors = p.q.dim(0) * p.q.dim(1);
    return (2 * vectors * PadHeadDim(p.q.dim(2)) + 2 * vectors + 15) / 16 * 16;
  }
  int64_t Row(int64_t kv_head, int64_t row) const { return (kv_head * rows + row) * group; }

  // Fills the rows of `range` for one KV head; delta = out . d_out.
  void Pack(const TreeAttentionBackwardParams& p, int64_t kv_head, RowRange range) const {
    const int64_t first = Row(kv_head, range.begin);
    PackQueries(p.q, range, kv_head, group, dim, q + first * dim);
    PackQueries(p.d_out, range, kv_head, group, dim, d_out + first * dim);
    for (int64_t i = 0; i < (range.end - range.begin) * group; ++i) {
      const int64_t row = range.begin + i / group, head = kv_head * group + i % group;
      lse[first + i] = p.lse.f32()[row * p.lse.stride[0] + head];
      delta[first + i] = SimdKernels().dot(
          p.out.f32() + row * p.out.stride[0] + head * p.out.stride[1],
          p.d_out.f32() + row * p.d_out.stride[0] + head * p.d_out.stride[1], p.q.dim(2));
    }
  }

  int64_t rows, group, dim;
  float *q, *d_out, *lse, *delta;
};

// Buffers of one thread, cut from one piece of scratch.
struct TileBuffers {
  TileBuffers(float* memory, int64_t m, int64_t dim)
      : d_q(memory),
        p(d_q + m * dim),
        d_s(p + m * kTileKeys),
        k_t(d_s + m * kTileKeys),
        v_t(k_t + dim * kTileKeys),
        k(v_t + dim * kTileKeys),
        d_k(k + dim * kTileKeys),
        d_v(d_k + dim * kTileKeys) {}
  static int64_t Size(int64_t m, int64_t dim) {
    const int64_t size = m * dim + 2 * m * kTileKeys + 5 * dim * kTileKeys;
    return (size + 15) / 16 * 16;
  }

  float *d_q, *p, *d_s, *k_t, *v_t, *k, *d_k, *d_v;
};

class BackwardItem {
 public:
  BackwardItem(const TreeAttentionBackwardParams& p, const PackedQueries& queries, int64_t kv_head,
               float* scratch)
      : p_(p),
        queries_(queries),
        plan_(CpuPlan(p.plan)),
        kv_head_(kv_head),
        group_(p.q.dim(1) / p.k.dim(1)),
        head_dim_(p.q.dim(2)),
        dim_(PadHeadDim(head_dim_)),
        keys_{plan_.batch(), p.k, p.context.k, kv_head},
        values_{plan_.batch(), p.v, p.context.v, kv_head},
        buffers_(scratch, QueryTile::kMaxRows * group_, dim_),
        visible_(QueryTile::kMaxRows * group_) {}

  // d_q of the rows of a tile.
  void Queries(const QueryTile& tile) {
    for (const RowSpan& span : tile.spans) {
      const TreeNode& node = plan_.nodes()[span.node];
      const int64_t rows = span.rows.end - span.rows.begin;
      const int64_t first_position = node.position + span.rows.begin - node.rows.begin;
      std::memset(buffers_.d_q, 0, rows * group_ * dim_ * sizeof(float));
      for (int64_t begin = 0; begin < first_position + rows; begin += kTileKeys) {
        const float *k[kTileKeys], *v[kTileKeys];
        const int64_t n = keys_.Vectors(node.path, begin, begin + kTileKeys, k);
        values_.Vectors(node.path, begin, begin + kTileKeys, v);
        LoadKeys(k, v, n);
        SimdKernels().pack_rows(k, n, head_dim_, dim_, buffers_.k);
        SetVisible(rows, first_position + 1 - begin, n);
        AttentionBackwardTile args = Tile(span.rows);
        args.k = buffers_.k;
        args.d_q = buffers_.d_q;
        SimdKernels().attention_backward(args);
      }
      UnpackQueries(buffers_.d_q, span.rows, kv_head_, group_, dim_, p_.d_q);
    }
  }

  // d_k and d_v of the keys of a tile: stored for packed keys, added for cached ones.
  void Keys(const KeyTile& tile) {
    const int64_t n = tile.end - tile.begin;
    const float *k[kTileKeys], *v[kTileKeys];
    for (int64_t i = 0; i < n; ++i) {
      k[i] = keys_.Vector(tile.run, tile.begin + i);
      v[i] = values_.Vector(tile.run, tile.begin + i);
    }
    LoadKeys(k, v, n);
    std::memset(buffers_.d_k, 0, 2 * kTileKeys * dim_ * sizeof(float));  // d_k and d_v
    for (const RowRange& range : tile.queries) {
      for (int64_t row = range.begin; row < range.end; row += QueryTile::kMaxRows) {
        const RowRange rows = {row, std::min(range.end, row + QueryTile::kMaxRows)};
        // Packed key i is seen from its own row on; cached keys by every row.
        const int64_t seen = tile.run.row >= 0 ? row - (tile.run.row + tile.begin) + 1 : n;
        SetVisible(rows.end - rows.begin, seen, n);
        AttentionBackwardTile args = Tile(rows);
        args.d_k = buffers_.d_k;
        args.d_v = buffers_.d_v;
        SimdKernels().attention_backward(args);
      }
    }
    StoreKeys(tile);
  }

 private:
  void LoadKeys(const float* const* k, const float* const* v, int64_t n) {
    SimdKernels().pack_columns(k, n, head_dim_, dim_, buffers_.k_t);
    SimdKernels().pack_columns(v, n, head_dim_, dim_, buffers_.v_t);
  }

  // The first row sees `seen` of the tile's n keys, each further row one more.
  void SetVisible(int64_t rows, int64_t seen, int64_t n) {
    for (int64_t i = 0; i < rows; ++i) {
      std::fill_n(visible_.begin() + i * group_, group_,
                  static_cast<int32_t>(std::min(seen + i, n)));
    }
  }

  AttentionBackwardTile Tile(RowRange rows) const {
    const int64_t first = queries_.Row(kv_head_, rows.begin);
    return {.m = (rows.end - rows.begin) * group_,
            .dim = dim_,
            .visible = visible_.data(),
            .scale = p_.scale,
            .q = queries_.q + first * dim_,
            .d_out = queries_.d_out + first * dim_,
            .lse = queries_.lse + first,
            .delta = queries_.delta + first,
            .k_t = buffers_.k_t,
            .v_t = buffers_.v_t,
            .p = buffers_.p,
            .d_s = buffers_.d_s,
            .k = nullptr,
            .d_q = nullptr,
            .d_k = nullptr,
            .d_v = nullptr};
  }

  void StoreKeys(const KeyTile& tile) {
    const KeyMemory d_keys = {plan_.batch(), p_.d_k, p_.d_context.k, kv_head_};
    const KeyMemory d_values = {plan_.batch(), p_.d_v, p_.d_context.v, kv_head_};
    for (int64_t i = 0; i < tile.end - tile.begin; ++i) {
      float* d_k = d_keys.Vector(tile.run, tile.begin + i);
      float* d_v = d_values.Vector(tile.run, tile.begin + i);
      if (tile.run.row >= 0) {
        std::memcpy(d_k, buffers_.d_k + i * dim_, head_dim_ * sizeof(float));
        std::memcpy(d_v, buffers_.d_v + i * dim_, head_dim_ * sizeof(float));
      } else {
        SimdKernels().add(buffers_.d_k + i * dim_, d_k, head_dim_);
        SimdKernels().add(buffers_.d_v + i * dim_, d_v, head_dim_);
      }
    }
  }

  const TreeAttentionBackwardParams& p_;
  const PackedQueries& queries_;
  const CpuBatchPlan& plan_;
  const int64_t kv_head_, group_, head_dim_, dim_;
  const KeyMemory keys_, values_;
  TileBuffers buffers_;
  std::vector<int32_t> visible_;
};

}  // namespace

absl::Status TreeAttentionBackward(Context& context, const TreeAttentionBackwardParams& p) {
  RETURN_IF_ERROR(CheckBackward(p));
  const CpuBatchPlan& plan = CpuPlan(p.plan);
  const int64_t rows = p.q.dim(0), kv_heads = p.k.dim(1);
  const int64_t buffer_size =
      TileBuffers::Size(QueryTile::kMaxRows * (p.q.dim(1) / kv_heads), PadHeadDim(p.q.dim(2)));
  const int num_threads = context.num_threads();
  float* buffers = context.Scratch(num_threads * buffer_size + PackedQueries::Size(p));
  const PackedQueries queries(p, buffers + num_threads * buffer_size);
  const auto item = [&](int64_t kv_head, int thread) {
    return BackwardItem(p, queries, kv_head, buffers + thread * buffer_size);
  };

  ParallelRanges(context, rows, QueryTile::kMaxRows, [&](int64_t begin, int64_t end) {
    for (int64_t h = 0; h < kv_heads; ++h) queries.Pack(p, h, {begin, end});
  });
  const int64_t num_query_tiles = static_cast<int64_t>(plan.query_tiles().size());
  ParallelFor(context, num_query_tiles * kv_heads, [&](int64_t i, int thread) {
    // Last tiles first: they see the most keys.
    item(i % kv_heads, thread).Queries(plan.query_tiles()[num_query_tiles - 1 - i / kv_heads]);
  });
  const int64_t num_key_tiles = static_cast<int64_t>(plan.key_tiles().size());
  ParallelFor(context, num_key_tiles * kv_heads, [&](int64_t i, int thread) {
    const KeyTile& tile = plan.key_tiles()[i / kv_heads];
    if (tile.run.row >= 0 || p.d_context.k.present()) item(i % kv_heads, thread).Keys(tile);
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
