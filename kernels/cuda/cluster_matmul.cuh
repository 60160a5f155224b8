// Products of many rows on wgmma + TMA whose epilogue is the caller's: the loop that the head and
// the gated products share. Operands are of a 16-bit type E that only the matrix instructions know.
//
// Persistent clusters of two blocks. A work item is 256 rows x 256 columns, 128 rows a block; each
// block loads its own rows of the left operand and half of the right one, which the copy engine
// writes to both blocks. Producer: one thread, a ring of four steps of 64 of k (16 + 32 KiB). Two
// consumer warpgroups of 64 rows each:
//   acc[64, 256] += left right      4 x m64n256k16 a step, one step in flight
// The second warpgroup starts kLag steps late and so stays behind: while one folds its tile, the
// other has the tensor cores to itself. Per item and block (128 + 128) * 2 k bytes for
// 2 * 128 * 256 k FLOP: 128 FLOP per byte of L2. Items go through the columns kRowPairs x 256 rows
// at a time: those rows stay in L2, and the right operand comes from memory once for all of them.
// A sum over k is one accumulator's: its bits depend on neither the batch nor the launch.
#pragma once

#include <algorithm>

#include "kernels/cuda/attention/hopper.cuh"
#include "kernels/cuda/attention/tensor_map.cuh"
#include "kernels/cuda/cluster.cuh"

namespace coppice::cuda {

constexpr int kBlocks = 2;                      // of a cluster
constexpr int kTileRows = 128;                  // of a block
constexpr int kTileColumns = 256;               // of the cluster
constexpr int kShare = kTileColumns / kBlocks;  // columns that a block loads
constexpr int kStages = 4;
constexpr int kItemStages = 2;
constexpr int kLag = 2;
constexpr int kRowPairs = 12;
constexpr int kConsumerWarps = 8;
constexpr int kTileThreads = 384;
constexpr int kLagBarrier = 1;  // named; callers may use those behind it

// What there is to do; part of a kernel's parameters.
struct TileWork {
  CUtensorMap left;  // [rows, k], boxes of kTileRows
  int* counter;      // 0 at the launch: the next item
  int row_pairs, tiles, k_blocks, items;
};

struct TileShared {
  alignas(1024) uint16_t left[kStages][kTileRows * kPanel];
  alignas(1024) uint16_t right[kStages][kTileColumns * kPanel];
  Barrier full[kStages], empty[kStages];
  int item[kItemStages];
  Barrier item_full[kItemStages];
  Barrier item_empty[kItemStages];  // the first block's counts for all
};

#define TILE_REGS_64                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define TILE_REGS_96                                 \
  "%96, %97, %98, %99, %100, %101, %102, %103, "     \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// As hopper.cuh's, 256 columns.
template <typename E>
__device__ __forceinline__ void WgmmaStep(float (&d)[128], uint64_t a, uint64_t b, bool add) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n256k16",
             "{" HOPPER_REGS_0 ", " HOPPER_REGS_32 ", " TILE_REGS_64 ", " TILE_REGS_96
             "}, %128, %129, p, 1, 1, 0, 0;\n}"
             : HOPPER_ACC32(d, 0), HOPPER_ACC32(d, 32), HOPPER_ACC32(d, 64), HOPPER_ACC32(d, 96)
             : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
// The same, rows of B are k.
template <typename E>
__device__ __forceinline__ void WgmmaStepRightRows(float (&d)[128], uint64_t a, uint64_t b,
                                                   bool add) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n256k16",
             "{" HOPPER_REGS_0 ", " HOPPER_REGS_32 ", " TILE_REGS_64 ", " TILE_REGS_96
             "}, %128, %129, p, 1, 1, 0, 1;\n}"
             : HOPPER_ACC32(d, 0), HOPPER_ACC32(d, 32), HOPPER_ACC32(d, 64), HOPPER_ACC32(d, 96)
             : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}

// The right operand as [columns, k]: the two blocks' shares are `share_stride` rows apart, so that
// a tile may be 256 neighbours or 128 gates and their ups.
struct RightColumns {
  CUtensorMap map;  // boxes of kShare rows
  int tile_stride, share_stride;

  __device__ __forceinline__ void Load(uint16_t* panels, int block, int tile, Barrier& full) const {
    const int rank = ClusterRank();
    LoadBoxForBoth(panels + rank * kShare * kPanel, map, block * kPanel, 0,
                   tile * tile_stride + rank * share_stride, full);
  }
  template <typename E>
  __device__ __forceinline__ static void Multiply(float (&acc)[128], const uint16_t* left,
                                                  const uint16_t* right, bool first) {
    const uint64_t a = ColumnsAreK(left), b = ColumnsAreK(right);
#pragma unroll
    for (int k = 0; k < kPanel; k += 16)
      WgmmaStep<E>(acc, Advanced(a, k * 2), Advanced(b, k * 2), !first || k != 0);
  }
};
// The right operand as [k, columns].
struct RightRows {
  CUtensorMap map;  // boxes of kPanel rows

  __device__ __forceinline__ void Load(uint16_t* panels, int block, int tile, Barrier& full) const {
    const int first = ClusterRank() * kShare;
#pragma unroll
    for (int column = first; column < first + kShare; column += kPanel)
      LoadBoxForBoth(panels + column * kPanel, map, tile * kTileColumns + column, 0, block * kPanel,
                     full);
  }
  template <typename E>
  __device__ __forceinline__ static void Multiply(float (&acc)[128], const uint16_t* left,
                                                  const uint16_t* right, bool first) {
    const uint64_t a = ColumnsAreK(left), b = RowsAreK(right, kPanel);
#pragma unroll
    for (int k = 0; k < kPanel; k += 16)
      WgmmaStepRightRows<E>(acc, Advanced(a, k * 2), Advanced(b, k * 128), !first || k != 0);
  }
};

struct Item {
  int row, tile;  // the block's first row
};
__device__ __forceinline__ Item ItemAt(const TileWork& w, int item) {
  const int section = item / (kRowPairs * w.tiles), first = section * kRowPairs;
  const int pairs = min(kRowPairs, w.row_pairs - first);
  const int inside = item - first * w.tiles;
  return {(first + inside % pairs) * kBlocks * kTileRows + ClusterRank() * kTileRows,
          inside / pairs};
}

// One thread. The first block's takes items from a counter, the next one while this one loads, and
// sends them to all threads of the cluster: who is ahead takes more, so that all stay close
// together among the columns.
template <class Right>
__device__ void ProduceTiles(const TileWork& w, const Right& right, TileShared& s) {
  constexpr int kStageBytes = (kTileRows + kTileColumns) * kPanel * 2;
  const int rank = ClusterRank();
  Ring<kItemStages> items;
  Ring<kStages> ring;
  for (int next = rank == 0 ? atomicAdd(w.counter, 1) : 0;; items.Advance()) {
    Barrier& full = s.item_full[items.stage];
    full.ArriveExpecting(sizeof(int));
    if (rank == 0) {
      s.item_empty[items.stage].Wait(items.phase ^ 1);
      for (int to = 0; to < kBlocks; ++to) SendTo(to, &s.item[items.stage], next, full);
      next = atomicAdd(w.counter, 1);
    }
    const int index = Receive(s.item[items.stage], full, items.phase);
    if (index >= w.items) break;
    ArriveAt(s.item_empty[items.stage], 0);
    const Item item = ItemAt(w, index);
    for (int block = 0; block < w.k_blocks; ++block, ring.Advance()) {
      const int stage = ring.stage;
      s.empty[stage].Wait(ring.phase ^ 1);
      s.full[stage].ArriveExpecting(kStageBytes);
      LoadBox(s.left[stage], w.left, block * kPanel, 0, item.row, s.full[stage]);
      right.Load(s.right[stage], block, item.tile, s.full[stage]);
    }
  }
}

// A consumer warp has read a stage; both blocks' producers write it.
__device__ __forceinline__ void ReleaseStage(Barrier& empty) {
  const int lane = threadIdx.x % 32;
  if (lane < kBlocks) ArriveAt(empty, lane);
}

// acc[64, 256] = this warpgroup's rows of the item times its columns. `early`: called while the
// tensor cores still work at the last step.
template <typename E, class Right, class Early>
__device__ __forceinline__ void MultiplyTile(const TileWork& w, TileShared& s, int group,
                                             Ring<kStages>& ring, float (&acc)[128], bool& announce,
                                             const Early& early) {
  Discard(acc);
  for (int block = 0; block < w.k_blocks; ++block) {
    const int stage = ring.stage;
    s.full[stage].Wait(ring.phase);
    WgmmaFence();
    Right::template Multiply<E>(acc, s.left[stage] + group * 64 * kPanel, s.right[stage],
                                block == 0);
    WgmmaCommit();
    WgmmaWait<1>();
    if (block > 0) ReleaseStage(s.empty[(stage + kStages - 1) % kStages]);
    ring.Advance();
    if (announce && block + 1 >= min(kLag, w.k_blocks)) {
      NamedArrive(kLagBarrier, 256);
      announce = false;
    }
  }
  early();
  WgmmaWait<0>();
  Pin(acc);
  ReleaseStage(s.empty[(ring.stage + kStages - 1) % kStages]);
}

// Consumers. For each item fold(item, multiply): it calls multiply(acc, early) once.
template <typename E, class Right, class Fold>
__device__ __forceinline__ void ConsumeTiles(const TileWork& w, TileShared& s, int group,
                                             const Fold& fold) {
  Ring<kItemStages> items;
  Ring<kStages> ring;
  bool announce = group == 0;
  if (group == 1) NamedSync(kLagBarrier, 256);
  for (;; items.Advance()) {
    const int index = Receive(s.item[items.stage], s.item_full[items.stage], items.phase);
    if (index >= w.items) break;
    ArriveAt(s.item_empty[items.stage], 0);
    fold(ItemAt(w, index), [&](float(&acc)[128], const auto& early) {
      MultiplyTile<E, Right>(w, s, group, ring, acc, announce, early);
    });
  }
  if (announce) NamedArrive(kLagBarrier, 256);
}

// The kernel's body: consume(group) runs ConsumeTiles.
template <class Right, class Consume>
__device__ __forceinline__ void RunTiles(const TileWork& w, const Right& right, TileShared& s,
                                         const Consume& consume) {
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
    if (threadIdx.x == 0) ProduceTiles(w, right, s);
  } else {
    TakeRegisters<240>();
    consume(group - 1);
  }
  ClusterSync();  // nobody leaves while the other block may write here
}

// left: [rows, k] E. tiles: of kTileColumns.
inline cudaError_t MakeTileWork(TileWork& w, const void* left, int64_t left_stride, int64_t rows,
                                int64_t k, int64_t tiles, int* counter) {
  if (auto e = MakeMap(w.left, {left, rows, left_stride, 1, static_cast<int32_t>(k)}, kTileRows))
    return e;
  w.counter = counter;
  w.row_pairs = static_cast<int>((rows + kBlocks * kTileRows - 1) / (kBlocks * kTileRows));
  w.tiles = static_cast<int>(tiles);
  w.k_blocks = static_cast<int>((k + kPanel - 1) / kPanel);
  w.items = w.row_pairs * w.tiles;
  return cudaSuccess;
}

// As many clusters as fit the device, or as there are items.
template <class Parameters>
cudaError_t LaunchTiles(void (*kernel)(Parameters), const Parameters& p, const TileWork& w,
                        int shared_bytes, cudaStream_t stream) {
  if (auto e =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return e;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.blockDim = kTileThreads;
  config.gridDim = kBlocks;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (auto e = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return e;
  config.gridDim = std::max(1, std::min(clusters, w.items)) * kBlocks;
  if (auto e = cudaMemsetAsync(w.counter, 0, sizeof(int), stream)) return e;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace coppice::cuda
