// Hidden rows times the vocabulary on wgmma + TMA, with the head's softmax as epilogue.
//
// Persistent clusters of two blocks. A work item is 256 rows x 256 tokens, 128 rows a block; each
// block loads its own rows and half of the tokens' weights, which the copy engine writes to both
// blocks. Producer: one thread, a ring of four steps of 64 columns (16 + 32 KiB). Two consumer
// warpgroups of 64 rows each:
//   acc[64, 256] += hidden weight^T      4 x m64n256k16 a step, one step in flight
// The second warpgroup starts kLag steps late and so stays behind: while one folds its tile, the
// other has the tensor cores to itself. Per item and block (128 + 128) * 2 k bytes for
// 2 * 128 * 256 k FLOP: 128 FLOP per byte of L2. Items go through the vocabulary kRowPairs x 256
// rows at a time: those rows stay in L2, and the weights come from memory once for all of them.
// Bound by tensor cores, on a card at its power limit; the statistics write 12 bytes a row and
// tile, the gradient 2 an element.
#include <algorithm>

#include "kernels/cuda/attention/hopper.cuh"
#include "kernels/cuda/attention/tensor_map.cuh"
#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/vocab_matmul.h"

namespace coppice::cuda {
namespace {

constexpr int kBlocks = 2;  // of a cluster
constexpr int kRows = 128;  // of a block
constexpr int kTokens = static_cast<int>(kVocabTile);
constexpr int kStages = 4;
constexpr int kItemStages = 2;
constexpr int kLag = 2;
constexpr int kRowPairs = 12;
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 384;
constexpr int kStagedColumns = 128;                  // of d_logits at a time
constexpr int kLagBarrier = 1, kStagingBarrier = 2;  // named; the second one and the next
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

struct VocabParameters {
  CUtensorMap hidden, weight, d_logits;
  VocabMatMulArgs args;
  int row_pairs, tiles, k_blocks, items;
  // Statistics.
  VocabPartials partials;
  float* target_z;
  // Gradient.
  const VocabRowGradient* rows;
  const float* d_logprobs;
};

struct VocabShared {
  alignas(1024) Bf16 hidden[kStages][kRows * kPanel];
  alignas(1024) Bf16 weight[kStages][kTokens * kPanel];
  Barrier full[kStages], empty[kStages];
  int item[kItemStages];
  Barrier item_full[kItemStages];
  Barrier item_empty[kItemStages];  // the first block's counts for all
};
struct VocabSharedStaged : VocabShared {
  alignas(1024) Bf16 staged[2][64 * kStagedColumns];  // of a warpgroup
};

// Until every thread of the cluster came here.
__device__ __forceinline__ void ClusterSync() {
  __syncwarp();
  ClusterArrive();
  ClusterWait();
}
// Counts this thread's arrival at block `rank`'s copy of a barrier. Nothing but reads by the tensor
// cores, which are over, comes before; release.cluster would put a fence of the whole device here.
__device__ __forceinline__ void ArriveAt(Barrier& barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [at];\n}" ::"r"(SharedAddress(&barrier.word)),
      "r"(rank)
      : "memory");
}
// Waits for SendTo, and returns what it brought.
__device__ __forceinline__ int Receive(const int& from, Barrier& full, uint32_t parity) {
  int value;
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
      "@!done bra again;\n"
      "ld.shared.b32 %0, [%3];\n}"
      : "=r"(value)
      : "r"(SharedAddress(&full.word)), "r"(parity), "r"(SharedAddress(&from))
      : "memory");
  return value;
}
// LoadBox into both blocks, each told by its own barrier.
__device__ __forceinline__ void LoadBoxForAll(void* to, const CUtensorMap& map, int column, int row,
                                              Barrier& full) {
  constexpr uint16_t kAll = (1 << kBlocks) - 1;
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(0), "r"(row), "r"(SharedAddress(&full.word)), "h"(kAll)
      : "memory");
}

#define VOCAB_REGS_64                        \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define VOCAB_REGS_96                                \
  "%96, %97, %98, %99, %100, %101, %102, %103, "     \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// As hopper.cuh's, 256 columns.
__device__ __forceinline__ void WgmmaStep(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" HOPPER_REGS_0 ", " HOPPER_REGS_32
      ", " VOCAB_REGS_64 ", " VOCAB_REGS_96 "}, %128, %129, p, 1, 1, 0, 0;\n}"
      : HOPPER_ACC32(d, 0), HOPPER_ACC32(d, 32), HOPPER_ACC32(d, 64), HOPPER_ACC32(d, 96)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

struct Item {
  int row, tile;  // the block's first row
};
__device__ __forceinline__ Item ItemAt(const VocabParameters& p, int item) {
  const int section = item / (kRowPairs * p.tiles), first = section * kRowPairs;
  const int pairs = min(kRowPairs, p.row_pairs - first);
  const int inside = item - first * p.tiles;
  return {(first + inside % pairs) * kBlocks * kRows + ClusterRank() * kRows, inside / pairs};
}

// One thread. The first block's takes items from a counter, the next one while this one loads, and
// sends them to all threads of the cluster: who is ahead takes more, so that all stay close
// together in the vocabulary.
__device__ void Produce(const VocabParameters& p, VocabShared& s) {
  constexpr int kShare = kTokens / kBlocks;
  constexpr int kStageBytes = (kRows + kTokens) * kPanel * 2;
  const int rank = ClusterRank();
  Ring<kItemStages> items;
  Ring<kStages> ring;
  for (int next = rank == 0 ? atomicAdd(p.args.counter, 1) : 0;; items.Advance()) {
    Barrier& full = s.item_full[items.stage];
    full.ArriveExpecting(sizeof(int));
    if (rank == 0) {
      s.item_empty[items.stage].Wait(items.phase ^ 1);
      for (int to = 0; to < kBlocks; ++to) SendTo(to, &s.item[items.stage], next, full);
      next = atomicAdd(p.args.counter, 1);
    }
    const int index = Receive(s.item[items.stage], full, items.phase);
    if (index >= p.items) break;
    ArriveAt(s.item_empty[items.stage], 0);
    const Item item = ItemAt(p, index);
    for (int block = 0; block < p.k_blocks; ++block, ring.Advance()) {
      const int stage = ring.stage, column = block * kPanel;
      s.empty[stage].Wait(ring.phase ^ 1);
      s.full[stage].ArriveExpecting(kStageBytes);
      LoadBox(s.hidden[stage], p.hidden, column, 0, item.row, s.full[stage]);
      LoadBoxForAll(s.weight[stage] + rank * kShare * kPanel, p.weight, column,
                    item.tile * kTokens + rank * kShare, s.full[stage]);
    }
  }
}

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
  // Calls fn(t, x) with the element of target t, where this thread holds it among the tile's
  // columns [kFirst, kFirst + kCount).
  template <int kFirst, int kCount, class Fn>
  __device__ __forceinline__ void ForEach(const VocabMatMulArgs& a, int tile, float (&acc)[128],
                                          const Fn& fn) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      for (int t = begin[h]; t < end[h]; ++t) {
        const int column = __ldg(a.targets + t) - tile * kTokens;
        if (column < kFirst || column >= kFirst + kCount) continue;
        const int at = column - threadIdx.x % 4 * 2;  // this thread holds multiples of 8, and 1 on
#pragma unroll
        for (int i = kFirst / 4; i < (kFirst + kCount) / 4; ++i)
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

// Writes the statistics of the tile's rows, and z of targets within it.
__device__ __forceinline__ void FoldTile(const VocabParameters& p, const Item& item,
                                         const Targets& targets, float (&acc)[128]) {
  const VocabMatMulArgs& a = p.args;
  const float scale_log2 = a.scale * kLog2e;
  const int columns = static_cast<int>(a.vocab) - item.tile * kTokens;
  targets.ForEach<0, kTokens>(a, item.tile, acc,
                              [&](int t, float x) { p.target_z[t] = x * a.scale; });
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
    for (int i = 0; i < 64; ++i) {
      const float below = fmaf(acc[i / 2 * 4 + 2 * h + i % 2], scale_log2, -shift);
      const float e = Exp2(below);
      sum[i % 2] += e;
      weighted[i % 2] = fmaf(e, below, weighted[i % 2]);
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

// Rounds columns [kFirst, kFirst + kStagedColumns) of the accumulators into a swizzled tile of 64
// rows.
template <int kFirst>
__device__ __forceinline__ void StageColumns(Bf16* tile, const float (&acc)[128]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
  const uint32_t base = SharedAddress(tile) + row * 128;
#pragma unroll
  for (int i = 0; i < kStagedColumns / 16; ++i) {
    const int chunk = 2 * (i % 4) + lane / 16;
    const uint32_t at = base + i / 4 * 64 * 128 + ((chunk ^ (row & 7)) << 4);
    const float* x = acc + kFirst / 2 + 8 * i;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(PackBf16(x[0], x[1])), "r"(PackBf16(x[2], x[3])), "r"(PackBf16(x[4], x[5])),
                 "r"(PackBf16(x[6], x[7]))
                 : "memory");
  }
}

// Writes the gradient of half of the tile's logits.
template <int kFirst>
__device__ __forceinline__ void StoreGradientColumns(const VocabParameters& p, const Item& item,
                                                     int group, const Targets& targets,
                                                     const float4 (&row)[2], Bf16* staged,
                                                     float (&acc)[128]) {
  const VocabMatMulArgs& a = p.args;
  const float scale_log2 = a.scale * kLog2e;
#pragma unroll
  for (int i = kFirst / 2; i < (kFirst + kStagedColumns) / 2; ++i) {
    const float4& g = row[i / 2 % 2];
    const float t = fmaf(acc[i], scale_log2, -g.x);
    acc[i] = -Exp2(t) * fmaf(g.z, t, g.y);
  }
  targets.ForEach<kFirst, kStagedColumns>(
      a, item.tile, acc, [&](int t, float& x) { x = fmaf(p.d_logprobs[t], a.scale, x); });
  // The stores before must have read the staging tile before it is overwritten.
  if (threadIdx.x % 128 == 0) WaitStoresRead();
  NamedSync(kStagingBarrier + group, 128);
  StageColumns<kFirst>(staged, acc);
  FenceAsyncShared();
  NamedSync(kStagingBarrier + group, 128);
  if (threadIdx.x % 128 != 0) return;
#pragma unroll
  for (int panel = 0; panel < kStagedColumns / kPanel; ++panel)
    StoreBox(p.d_logits, staged + panel * 64 * kPanel,
             item.tile * kTokens + kFirst + panel * kPanel, 0, item.row + group * 64);
  CommitStores();
}

__device__ __forceinline__ void StoreGradient(const VocabParameters& p, const Item& item, int group,
                                              const Targets& targets, Bf16* staged,
                                              float (&acc)[128]) {
  float4 row[2] = {};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (targets.first + 8 * h < p.args.rows)
      row[h] = __ldg(reinterpret_cast<const float4*>(p.rows + targets.first + 8 * h));
  }
  StoreGradientColumns<0>(p, item, group, targets, row, staged, acc);
  StoreGradientColumns<kStagedColumns>(p, item, group, targets, row, staged, acc);
}

// A consumer warp has read a stage; both blocks' producers write it.
__device__ __forceinline__ void ReleaseStage(Barrier& empty) {
  const int lane = threadIdx.x % 32;
  if (lane < kBlocks) ArriveAt(empty, lane);
}

// acc[64, 256] = this warpgroup's rows of the item times its tokens.
__device__ __forceinline__ void Multiply(const VocabParameters& p, VocabShared& s, int group,
                                         Ring<kStages>& ring, float (&acc)[128], bool& announce) {
  Discard(acc);
  for (int block = 0; block < p.k_blocks; ++block) {
    const int stage = ring.stage;
    s.full[stage].Wait(ring.phase);
    const uint64_t a = ColumnsAreK(s.hidden[stage] + group * 64 * kPanel);
    const uint64_t b = ColumnsAreK(s.weight[stage]);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kPanel; k += 16)
      WgmmaStep(acc, Advanced(a, k * 2), Advanced(b, k * 2), block != 0 || k != 0);
    WgmmaCommit();
    WgmmaWait<1>();
    if (block > 0) ReleaseStage(s.empty[(stage + kStages - 1) % kStages]);
    ring.Advance();
    if (announce && block + 1 >= min(kLag, p.k_blocks)) {
      NamedArrive(kLagBarrier, 256);
      announce = false;
    }
  }
  WgmmaWait<0>();
  Pin(acc);
  ReleaseStage(s.empty[(ring.stage + kStages - 1) % kStages]);
}

template <bool kGradient, class Shared>
__device__ void Consume(const VocabParameters& p, Shared& s, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  Ring<kItemStages> items;
  Ring<kStages> ring;
  bool announce = group == 0;
  if (group == 1) NamedSync(kLagBarrier, 256);
  for (;; items.Advance()) {
    const int index = Receive(s.item[items.stage], s.item_full[items.stage], items.phase);
    if (index >= p.items) break;
    ArriveAt(s.item_empty[items.stage], 0);
    const Item item = ItemAt(p, index);
    const Targets targets(p.args, item.row + group * 64 + warp * 16 + lane / 4);
    float acc[128];
    Multiply(p, s, group, ring, acc, announce);
    if constexpr (kGradient) {
      StoreGradient(p, item, group, targets, s.staged[group], acc);
    } else {
      FoldTile(p, item, targets, acc);
    }
  }
  if (announce) NamedArrive(kLagBarrier, 256);
  if (kGradient && threadIdx.x % 128 == 0) WaitStoresRead();
}

template <bool kGradient, class Shared>
__global__ void __launch_bounds__(kThreads, 1)
    VocabMatMulKernel(const __grid_constant__ VocabParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      s.full[i].Init(1);
      s.empty[i].Init(kBlocks * kConsumerWarps);
    }
    for (int i = 0; i < kItemStages; ++i) {
      s.item_full[i].Init(1);
      s.item_empty[i].Init(kBlocks * (1 + 32 * kConsumerWarps));
    }
    FenceBarrierInit();
  }
  ClusterSync();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    GiveRegisters<24>();
    if (threadIdx.x == 0) Produce(p, s);
  } else {
    TakeRegisters<240>();
    Consume<kGradient>(p, s, group - 1);
  }
  ClusterSync();  // nobody leaves while the other block may write here
}

cudaError_t MakeParameters(const VocabMatMulArgs& a, VocabParameters& p) {
  const auto k = static_cast<int32_t>(a.k);
  if (auto e = MakeMap(p.hidden, {a.hidden, a.rows, a.hidden_stride, 1, k}, kRows)) return e;
  if (auto e = MakeMap(p.weight, {a.weight, a.vocab, a.weight_stride, 1, k}, kTokens / kBlocks))
    return e;
  p.args = a;
  p.row_pairs = static_cast<int>((a.rows + kBlocks * kRows - 1) / (kBlocks * kRows));
  p.tiles = static_cast<int>(NumVocabTiles(a.vocab));
  p.k_blocks = static_cast<int>((a.k + kPanel - 1) / kPanel);
  p.items = p.row_pairs * p.tiles;
  return cudaSuccess;
}

template <class Shared>
cudaError_t Launch(void (*kernel)(VocabParameters), const VocabParameters& p, cudaStream_t stream) {
  const int bytes = sizeof(Shared);
  if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return e;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = kThreads;
  config.gridDim = kBlocks;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (auto e = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return e;
  config.gridDim = std::max(1, std::min(clusters, p.items)) * kBlocks;
  if (auto e = cudaMemsetAsync(p.args.counter, 0, sizeof(int), stream)) return e;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t LaunchVocabStats(const VocabMatMulArgs& args, const VocabPartials& partials,
                             float* target_z, cudaStream_t stream) {
  VocabParameters p = {};
  if (auto e = MakeParameters(args, p)) return e;
  p.partials = partials;
  p.target_z = target_z;
  return Launch<VocabShared>(VocabMatMulKernel<false, VocabShared>, p, stream);
}

cudaError_t LaunchVocabGradient(const VocabMatMulArgs& args, const VocabRowGradient* rows,
                                const float* d_logprobs, void* d_logits, cudaStream_t stream) {
  VocabParameters p = {};
  if (auto e = MakeParameters(args, p)) return e;
  const int64_t ld = (args.vocab + 7) / 8 * 8;
  if (auto e = MakeMap(p.d_logits, {d_logits, args.rows, ld, 1, static_cast<int32_t>(ld)}, 64))
    return e;
  p.rows = rows;
  p.d_logprobs = d_logprobs;
  return Launch<VocabSharedStaged>(VocabMatMulKernel<true, VocabSharedStaged>, p, stream);
}

}  // namespace coppice::cuda
