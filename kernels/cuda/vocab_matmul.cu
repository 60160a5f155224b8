// Hidden rows times the vocabulary on wgmma + TMA, with the head's softmax as epilogue.
//
// cluster_matmul.cuh has the product; kTokens columns of a tile are tokens.
// Bound by tensor cores, on a card at its power limit; the statistics write 12 bytes a row and
// tile, exps 2 an element.
#include "kernels/cuda/cluster_matmul.cuh"
#include "kernels/cuda/vocab_matmul.h"

namespace coppice::cuda {
namespace {

constexpr int kTokens = static_cast<int>(kVocabTile);
static_assert(kTokens == kTileColumns);
constexpr int kStagedColumns = 128;               // of exps at a time
constexpr int kStagingBarrier = kLagBarrier + 1;  // named; this one and the next
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct VocabParameters {
  TileWork work;
  RightColumns weight;
  CUtensorMap exps;
  VocabMatMulArgs args;
  VocabPartials partials;
  float* target_z;
};

struct VocabSharedStaged : TileShared {
  alignas(1024) uint16_t staged[2][64 * kStagedColumns];  // of a warpgroup
};

// This thread's two rows, `first` and 8 below, and what goes with them.
struct Targets {
  int first, begin[2], end[2];

  __device__ __forceinline__ Targets(const VocabMatMulArgs& a, int row) : first(row) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool inside = row + 8 * h < a.rows;
      begin[h] = inside ? __ldg(a.target_indptr + row + 8 * h) : 0;
      end[h] = inside ? __ldg(a.target_indptr + row + 8 * h + 1) : 0;
    }
  }
  // Calls fn(t, x) with the element of target t, where this thread holds it.
  template <class Fn>
  __device__ __forceinline__ void ForEach(const VocabMatMulArgs& a, int tile,
                                          const float (&acc)[128], const Fn& fn) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int t = begin[h]; t < end[h]; ++t) {
        const int column = __ldg(a.targets + t) - tile * kTokens;
        if (column < 0 || column >= kTokens) continue;
        const int at = column - threadIdx.x % 4 * 2;  // this thread holds multiples of 8, and 1 on
#pragma unroll
        for (int i = 0; i < kTokens / 4; ++i)
          if (at == i / 2 * 8 + i % 2) fn(t, acc[i / 2 * 4 + 2 * h + i % 2]);
      }
    }
  }
};

template <class Op>
__device__ __forceinline__ float QuadReduce(float x, const Op& op) {
  x = op(x, __shfl_xor_sync(~0u, x, 1));
  return op(x, __shfl_xor_sync(~0u, x, 2));
}

// Writes the statistics of the tile's rows, and z of targets within it. kExps: leaves exp(z - max)
// in `exps`, rounded, pairs of neighbours in the accumulators' order.
template <typename E, bool kExps>
__device__ __forceinline__ void FoldTile(const VocabParameters& p, const Item& item,
                                         const Targets& targets, float (&acc)[128],
                                         uint32_t (&exps)[64]) {
  const VocabMatMulArgs& a = p.args;
  const float scale_log2 = a.scale * kLog2e;
  const int columns = static_cast<int>(a.vocab) - item.tile * kTokens;
  targets.ForEach(a, item.tile, acc, [&](int t, float x) { p.target_z[t] = x * a.scale; });
  if (columns < kTokens) {  // tokens behind the last one
#pragma unroll
    for (int i = 0; i < 128; ++i)
      if (i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2 >= columns) acc[i] = -1e20f;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float top = acc[2 * h];
#pragma unroll
    for (int i = 0; i < 64; ++i) top = fmaxf(top, acc[i / 2 * 4 + 2 * h + i % 2]);
    top = QuadReduce(top, [](float x, float y) { return fmaxf(x, y); });
    const float shift = top * scale_log2;
    float sum[2] = {}, weighted[2] = {};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      float e[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float below = fmaf(acc[4 * i + 2 * h + j], scale_log2, -shift);
        e[j] = Exp2(below);
        sum[j] += e[j];
        weighted[j] = fmaf(e[j], below, weighted[j]);
      }
      if constexpr (kExps) exps[2 * i + h] = PackPair<E>(e[0], e[1]);
    }
    const auto add = [](float x, float y) { return x + y; };
    const float total = QuadReduce(sum[0] + sum[1], add);
    const float total_weighted = QuadReduce(weighted[0] + weighted[1], add);
    const int row = targets.first + 8 * h;
    if (threadIdx.x % 4 == 0 && row < a.rows) {
      const int64_t at = item.tile * a.rows + row;
      p.partials.max[at] = top * a.scale;
      p.partials.sum[at] = total;
      p.partials.weighted[at] = total_weighted * kLn2;
    }
  }
}

// Columns [kFirst, kFirst + kStagedColumns) into a swizzled tile of 64 rows.
template <int kFirst>
__device__ __forceinline__ void StageColumns(uint16_t* tile, const uint32_t (&exps)[64]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
  const uint32_t base = SharedAddress(tile) + row * 128;
#pragma unroll
  for (int i = 0; i < kStagedColumns / 16; ++i) {
    const int chunk = 2 * (i % 4) + lane / 16;
    const uint32_t at = base + i / 4 * 64 * 128 + ((chunk ^ (row & 7)) << 4);
    const uint32_t* x = exps + kFirst / 4 + 4 * i;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  }
}

// Writes half of the tile's exps.
template <int kFirst>
__device__ __forceinline__ void StoreColumns(const VocabParameters& p, const Item& item, int group,
                                             uint16_t* staged, const uint32_t (&exps)[64]) {
  // The stores before must have read the staging tile before it is overwritten.
  if (threadIdx.x % 128 == 0) WaitStoresRead();
  NamedSync(kStagingBarrier + group, 128);
  StageColumns<kFirst>(staged, exps);
  FenceAsyncShared();
  NamedSync(kStagingBarrier + group, 128);
  if (threadIdx.x % 128 != 0) return;
#pragma unroll
  for (int panel = 0; panel < kStagedColumns / kPanel; ++panel)
    StoreBox(p.exps, staged + panel * 64 * kPanel, item.tile * kTokens + kFirst + panel * kPanel, 0,
             item.row + group * 64);
  CommitStores();
}

template <typename E, bool kExps, class Shared>
__device__ void Consume(const VocabParameters& p, Shared& s, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  ConsumeTiles<E, RightColumns>(p.work, s, group, [&](const Item& item, const auto& multiply) {
    const Targets targets(p.args, item.row + group * 64 + warp * 16 + lane / 4);
    float acc[128];
    multiply(acc, [] {});
    uint32_t exps[64];
    FoldTile<E, kExps>(p, item, targets, acc, exps);
    if constexpr (kExps) {
      StoreColumns<0>(p, item, group, s.staged[group], exps);
      StoreColumns<kStagedColumns>(p, item, group, s.staged[group], exps);
    }
  });
  if (kExps && threadIdx.x % 128 == 0) WaitStoresRead();
}

template <typename E, bool kExps, class Shared>
__global__ void __launch_bounds__(kTileThreads, 1)
    VocabMatMulKernel(const __grid_constant__ VocabParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<Shared*>(raw);
  RunTiles(p.work, p.weight, s, [&](int group) { Consume<E, kExps>(p, s, group); });
}

cudaError_t MakeParameters(const VocabMatMulArgs& a, VocabParameters& p) {
  const int64_t tiles = NumVocabTiles(a.vocab);
  if (auto e = MakeTileWork(p.work, a.hidden, a.hidden_stride, a.rows, a.k, tiles, a.counter))
    return e;
  const auto k = static_cast<int32_t>(a.k);
  if (auto e = MakeMap(p.weight.map, {a.weight, a.vocab, a.weight_stride, 1, k}, kShare)) return e;
  p.weight.tile_stride = kTokens;
  p.weight.share_stride = kShare;
  p.args = a;
  return cudaSuccess;
}

template <bool kExps, class Shared>
cudaError_t Launch(const VocabParameters& p, cudaStream_t stream) {
  return ForElement(p.args.dtype, [&](auto e) {
    return LaunchTiles(VocabMatMulKernel<decltype(e), kExps, Shared>, p, p.work, sizeof(Shared),
                       stream);
  });
}

}  // namespace

cudaError_t LaunchVocabStats(const VocabMatMulArgs& args, const VocabPartials& partials,
                             float* target_z, void* exps, cudaStream_t stream) {
  VocabParameters p = {};
  if (auto e = MakeParameters(args, p)) return e;
  p.partials = partials;
  p.target_z = target_z;
  if (exps == nullptr) return Launch<false, TileShared>(p, stream);
  const int64_t ld = (args.vocab + 7) / 8 * 8;
  if (auto e = MakeMap(p.exps, {exps, args.rows, ld, 1, static_cast<int32_t>(ld)}, 64)) return e;
  return Launch<true, VocabSharedStaged>(p, stream);
}

}  // namespace coppice::cuda
