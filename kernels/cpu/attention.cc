// Tree attention, forward: for every row q and query head, over the keys on q's path,
//   out = softmax(scale q.K^T) V,   lse = log sum exp(scale q.K^T)
// by online softmax over tiles of kTileKeys keys (Milakov & Gimelshein 2018; Dao et al. 2022,
// FlashAttention).
//
// Work item: one query tile and one KV head. The rows of a tile, times the query heads that share
// the KV head, are stacked, so that a packed tile of keys serves all of them: in decode, a prompt
// shared by a group is read once for the group. Keys that only some of the tile's rows see are
// visited span by span.
//
// Tiles lie at absolute path positions and are visited in order, and no sum depends on a tile's
// other rows. So a row's result is the same, bit for bit, wherever the cut between cached context
// and packed rows lies and whatever else is in the batch.
//
// Cost: 4 head_dim multiply-adds per (query head, visible key), rounded up to tiles; bound by the
// multipliers in prefill and by reading K and V in decode.
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/base/status_macros.h"
#include "kernels/cpu/attention_inputs.h"
#include "kernels/cpu/families.h"
#include "kernels/cpu/parallel.h"
#include "kernels/ops/shape_check.h"

namespace coppice::cpu {
namespace {

// Buffers of one thread, cut from one piece of scratch.
struct TileBuffers {
  TileBuffers(float* memory, int64_t m, int64_t dim)
      : q(memory),
        out(q + m * dim),
        scores(out + m * dim),
        max(scores + m * kTileKeys),
        sum(max + m),
        k_t(sum + m),
        v(k_t + dim * kTileKeys) {}
  static int64_t Size(int64_t m, int64_t dim) {
    const int64_t size = 2 * m * dim + m * kTileKeys + 2 * m + 2 * dim * kTileKeys;
    return (size + 15) / 16 * 16;
  }

  float *q, *out, *scores, *max, *sum, *k_t, *v;
};

class ForwardItem {
 public:
  ForwardItem(const ops::TreeAttentionParams& p, int64_t kv_head, float* scratch)
      : p_(p),
        plan_(CpuPlan(p.plan)),
        kv_head_(kv_head),
        group_(p.q.dim(1) / p.k.dim(1)),
        head_dim_(p.q.dim(2)),
        dim_(PadHeadDim(head_dim_)),
        keys_{plan_.batch(), p.k, p.context.k, kv_head},
        values_{plan_.batch(), p.v, p.context.v, kv_head},
        buffers_(scratch, QueryTile::kMaxRows * group_, dim_),
        visible_(QueryTile::kMaxRows * group_) {}

  void Run(const QueryTile& tile) {
    Load(tile);
    const int64_t common_tiles = tile.common_keys / kTileKeys;
    for (int64_t t = 0; t < common_tiles; ++t) {
      Visit(plan_.nodes()[tile.spans[0].node], t, tile.spans[0].rows, 0, tile.num_rows);
    }
    int64_t first = 0;  // of the span among the tile's rows
    for (const RowSpan& span : tile.spans) {
      const TreeNode& node = plan_.nodes()[span.node];
      const int64_t rows = span.rows.end - span.rows.begin;
      const int64_t last_position = node.position + span.rows.end - 1 - node.rows.begin;
      for (int64_t t = common_tiles; t <= last_position / kTileKeys; ++t) {
        Visit(node, t, span.rows, first, rows);
      }
      first += rows;
    }
    Store(tile);
  }

 private:
  void Load(const QueryTile& tile) {
    float* q = buffers_.q;
    for (const RowSpan& span : tile.spans) {
      PackQueries(p_.q, span.rows, kv_head_, group_, dim_, q);
      q += (span.rows.end - span.rows.begin) * group_ * dim_;
    }
    const int64_t m = tile.num_rows * group_;
    std::fill(buffers_.max, buffers_.max + m, -std::numeric_limits<float>::infinity());
    std::fill(buffers_.sum, buffers_.sum + m, 0.0f);
    std::fill(buffers_.out, buffers_.out + m * dim_, 0.0f);
  }

  // Tile `t` of the node's path, for `rows` rows of the query tile from `first` on. Rows beyond
  // `range` (other spans) see the whole tile.
  void Visit(const TreeNode& node, int64_t t, RowRange range, int64_t first, int64_t rows) {
    const float* vectors[kTileKeys];
    const int64_t begin = t * kTileKeys;
    const int64_t n = keys_.Vectors(node.path, begin, begin + kTileKeys, vectors);
    SimdKernels().pack_columns(vectors, n, head_dim_, dim_, buffers_.k_t);
    values_.Vectors(node.path, begin, begin + kTileKeys, vectors);
    SimdKernels().pack_rows(vectors, n, head_dim_, dim_, buffers_.v);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t position = node.position + range.begin + i - node.rows.begin;
      const bool inside = i < range.end - range.begin;
      const int64_t visible = inside ? std::min(position + 1 - begin, kTileKeys) : kTileKeys;
      std::fill_n(visible_.begin() + i * group_, group_, static_cast<int32_t>(visible));
    }
    const int64_t at = first * group_;
    SimdKernels().attention_forward({.m = rows * group_,
                                     .dim = dim_,
                                     .visible = visible_.data(),
                                     .scale = p_.scale,
                                     .q = buffers_.q + at * dim_,
                                     .k_t = buffers_.k_t,
                                     .v = buffers_.v,
                                     .scores = buffers_.scores,
                                     .max = buffers_.max + at,
                                     .sum = buffers_.sum + at,
                                     .out = buffers_.out + at * dim_});
  }

  void Store(const QueryTile& tile) {
    int64_t at = 0;
    for (const RowSpan& span : tile.spans) {
      for (int64_t row = span.rows.begin; row < span.rows.end; ++row) {
        for (int64_t h = kv_head_ * group_; h < (kv_head_ + 1) * group_; ++h, ++at) {
          const float sum = buffers_.sum[at];
          const float* src = buffers_.out + at * dim_;
          float* dst = p_.out.f32() + row * p_.out.stride[0] + h * p_.out.stride[1];
          for (int64_t d = 0; d < head_dim_; ++d) dst[d] = src[d] / sum;
          if (!p_.lse.present()) continue;
          p_.lse.f32()[row * p_.lse.stride[0] + h] = buffers_.max[at] + std::log(sum);
        }
      }
    }
  }

  const ops::TreeAttentionParams& p_;
  const CpuBatchPlan& plan_;
  const int64_t kv_head_, group_, head_dim_, dim_;
  const KeyMemory keys_, values_;
  TileBuffers buffers_;
  std::vector<int32_t> visible_;
};

}  // namespace

absl::Status TreeAttention(Context& context, const ops::TreeAttentionParams& p) {
  RETURN_IF_ERROR(
      CheckAttentionInputs("tree_attention", p.plan, p.q, p.k, p.v, p.context, p.scale));
  const int64_t rows = p.q.dim(0), q_heads = p.q.dim(1), head_dim = p.q.dim(2);
  RETURN_IF_ERROR(ops::ShapeCheck("tree_attention")
                      .Tensor("out", p.out, DType::kF32, {rows, q_heads, head_dim})
                      .Optional("lse", p.lse, DType::kF32, {rows, q_heads})
                      .status());
  const std::vector<QueryTile>& tiles = CpuPlan(p.plan).query_tiles();
  const int64_t kv_heads = p.k.dim(1), num_tiles = static_cast<int64_t>(tiles.size());
  const int64_t size =
      TileBuffers::Size(QueryTile::kMaxRows * (q_heads / kv_heads), PadHeadDim(head_dim));
  float* scratch = context.Scratch(context.num_threads() * size);
  ParallelFor(context, num_tiles * kv_heads, [&](int64_t i, int thread) {
    // Last tiles first: they see the most keys.
    ForwardItem(p, i % kv_heads, scratch + thread * size).Run(tiles[num_tiles - 1 - i / kv_heads]);
  });
  return absl::OkStatus();
}

}  // namespace coppice::cpu
