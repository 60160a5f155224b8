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

// Buffers of one thread, cut from one piece of scratch.
struct TileBuffers {
  TileBuffers(float* memory, int64_t m, int64_t dim)
      : q(memory),
        d_out(q + m * dim),
        d_q(d_out + m * dim),
        p(d_q + m * dim),
        d_s(p + m * kTileKeys),
        lse(d_s + m * kTileKeys),
        delta(lse + m),
        k_t(delta + m),
        v_t(k_t + dim * kTileKeys),
        k(v_t + dim * kTileKeys),
        d_k(k + dim * kTileKeys),
        d_v(d_k + dim * kTileKeys) {}
  static int64_t Size(int64_t m, int64_t dim) {
    const int64_t size = 3 * m * dim + 2 * m * kTileKeys + 2 * m + 5 * dim * kTileKeys;
    return (size + 15) / 16 * 16;
  }

  float *q, *d_out, *d_q, *p, *d_s, *lse, *delta, *k_t, *v_t, *k, *d_k, *d_v;
};

class BackwardItem {
 public:
  // delta: [rows, q_heads]
  BackwardItem(const TreeAttentionBackwardParams& p, const float* delta, int64_t kv_head,
               float* scratch)
      : p_(p),
        delta_(delta),
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
      LoadQueries(span.rows);
      std::memset(buffers_.d_q, 0, rows * group_ * dim_ * sizeof(float));
      for (int64_t begin = 0; begin < first_position + rows; begin += kTileKeys) {
        const float *k[kTileKeys], *v[kTileKeys];
        const int64_t n = keys_.Vectors(node.path, begin, begin + kTileKeys, k);
        values_.Vectors(node.path, begin, begin + kTileKeys, v);
        LoadKeys(k, v, n);
        SimdKernels().pack_rows(k, n, head_dim_, dim_, buffers_.k);
        SetVisible(rows, first_position + 1 - begin, n);
        AttentionBackwardTile args = Tile(rows);
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
        LoadQueries(rows);
        // Packed key i is seen from its own row on; cached keys by every row.
        const int64_t seen = tile.run.row >= 0 ? row - (tile.run.row + tile.begin) + 1 : n;
        SetVisible(rows.end - rows.begin, seen, n);
        AttentionBackwardTile args = Tile(rows.end - rows.begin);
        args.d_k = buffers_.d_k;
        args.d_v = buffers_.d_v;
        SimdKernels().attention_backward(args);
      }
    }
    StoreKeys(tile);
  }

 private:
  void LoadQueries(RowRange rows) {
    PackQueries(p_.q, rows, kv_head_, group_, dim_, 1.0f, buffers_.q);
    PackQueries(p_.d_out, rows, kv_head_, group_, dim_, 1.0f, buffers_.d_out);
    int64_t at = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      for (int64_t h = kv_head_ * group_; h < (kv_head_ + 1) * group_; ++h, ++at) {
        buffers_.lse[at] = p_.lse.f32()[row * p_.lse.stride[0] + h];
        buffers_.delta[at] = delta_[row * p_.q.dim(1) + h];
      }
    }
  }

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

  AttentionBackwardTile Tile(int64_t rows) const {
    return {.m = rows * group_,
            .dim = dim_,
            .visible = visible_.data(),
            .scale = p_.scale,
            .q = buffers_.q,
            .d_out = buffers_.d_out,
            .lse = buffers_.lse,
            .delta = buffers_.delta,
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
  const float* delta_;
  const CpuBatchPlan& plan_;
  const int64_t kv_head_, group_, head_dim_, dim_;
  const KeyMemory keys_, values_;
  TileBuffers buffers_;
  std::vector<int32_t> visible_;
};

// delta[row, head] = out . d_out
void ComputeDelta(Context& context, const TreeAttentionBackwardParams& p, float* delta) {
  const int64_t rows = p.q.dim(0), q_heads = p.q.dim(1), head_dim = p.q.dim(2);
  ParallelRanges(context.num_threads(), rows, 32, [&](int64_t begin, int64_t end) {
    std::fill(delta + begin * q_heads, delta + end * q_heads, 0.0f);
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t h = 0; h < q_heads; ++h) {
        SimdKernels().dot_gemm(
            {.m = 1,
             .n = 1,
             .k = head_dim,
             .a = p.out.f32() + row * p.out.stride[0] + h * p.out.stride[1],
             .a_row = 0,
             .b = p.d_out.f32() + row * p.d_out.stride[0] + h * p.d_out.stride[1],
             .b_row = 0,
             .c = delta + row * q_heads + h,
             .c_row = 0});
      }
    }
  });
}

}  // namespace

absl::Status TreeAttentionBackward(Context& context, const TreeAttentionBackwardParams& p) {
  RETURN_IF_ERROR(CheckBackward(p));
  const CpuBatchPlan& plan = CpuPlan(p.plan);
  const int64_t rows = p.q.dim(0), q_heads = p.q.dim(1), kv_heads = p.k.dim(1);
  const int64_t size =
      TileBuffers::Size(QueryTile::kMaxRows * (q_heads / kv_heads), PadHeadDim(p.q.dim(2)));
  float* delta = context.Scratch(rows * q_heads + 16 + context.num_threads() * size);
  float* buffers = delta + (rows * q_heads + 15) / 16 * 16;
  ComputeDelta(context, p, delta);

  const int64_t num_query_tiles = static_cast<int64_t>(plan.query_tiles().size());
  ParallelFor(context.num_threads(), num_query_tiles * kv_heads, [&](int64_t i, int thread) {
    BackwardItem(p, delta, i % kv_heads, buffers + thread * size)
        .Queries(plan.query_tiles()[num_query_tiles - 1 - i / kv_heads]);
  });
  const bool skip_context = !p.d_context.k.present();
  const int64_t num_key_tiles = static_cast<int64_t>(plan.key_tiles().size());
  ParallelFor(context.num_threads(), num_key_tiles * kv_heads, [&](int64_t i, int thread) {
    const KeyTile& tile = plan.key_tiles()[i / kv_heads];
    if (tile.run.row < 0 && skip_context) return;
    BackwardItem(p, delta, i % kv_heads, buffers + thread * size).Keys(tile);
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
