// Forward pass. One persistent CTA per multiprocessor; a work item is one 128-row query tile of one
// query head. Producer warpgroup: loads Q once per item, then K and V tiles of 128 keys into rings
// of two stages; with D = 256 in steps of half a tile. Two consumer warpgroups, 64 query rows each;
// per step and warpgroup
//   S = Q K^T          D / 16 x m64n128k16 (D = 256: n64), both operands from shared memory
//   online softmax     in registers, base 2
//   O += P V           8 x m64n128k16 (D = 256: 4 x 2, O in two parts), P from registers
// S of the next step is issued before O += P V of this one, so the softmax of the next step runs
// under O += P V. Shared memory: D = 128: Q 32 + 2 x (K 32 + V 32) + O 32 = 192 KB; D = 256: Q 64,
// the rest the same. Traffic per item: 512 D bytes a key tile for 65536 D FLOP, 128 FLOP per L2
// byte; query heads of one KV head are neighbours in the item order, so they share the tiles in L2.
// Where their number is even, two of them make a cluster and copy half of K and V each, for both:
// 256 FLOP per L2 byte.
#include <algorithm>
#include <bit>

#include "kernels/cuda/attention/launchers.h"
#include "kernels/cuda/attention/pipeline.cuh"
#include "kernels/cuda/attention/softmax.cuh"

namespace coppice::cuda {
namespace {

constexpr int kStages = 2;
constexpr int kAllConsumers = 3;  // named barrier
// Keys of a step, and the columns that one product covers.
template <int D>
constexpr int kStepKeys = D == 256 ? kKeyTile / 2 : kKeyTile;
template <int D>
constexpr int kSteps = kKeyTile / kStepKeys<D>;
template <int D>
constexpr int kWidth = D < 128 ? D : 128;
template <int D>
constexpr int kParts = D / kWidth<D>;

struct ForwardParameters {
  CUtensorMap q, k, v, o, ends, context_k, context_v, context_ends;
  AttentionSchedule schedule;
  ItemOrder order;
  uint16_t* out;                // of E
  int64_t out_stride, no_slot;  // a row past the pages: loads as zeros
  float* lse;
  int* counter;
  // Of a context tile: slots of a run are 2^run_shift, rows of one load `piece`. A division here
  // would delay every copy.
  int run_shift, piece;
  int q_heads, group_size;
  float scale;
};

struct ForwardWork {
  int head, count;  // steps; < 0: no more work
  QueryTileWork tile;
};

template <typename E, int D>
struct ForwardShared {
  alignas(1024) E q[kQueryTile * D];
  alignas(1024) E k[kStages][kStepKeys<D> * D];
  alignas(1024) E v[kStages][kStepKeys<D> * D];
  alignas(1024) E o[kQueryTile * kWidth<D>];
  alignas(16) int end[kStages][kStepKeys<D>];
  ForwardWork work;
  ItemMail mail;
  Barrier q_full, q_empty;
  Barrier k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

// Loads one step of a key tile, its keys from `first` on, of one tensor: packed rows, or context
// piece by piece. In a cluster each block loads a share of the rows, for all.
template <int kBlocks, int D, typename E>
__device__ __forceinline__ void LoadKeys(const ForwardParameters& p, E* to,
                                         const CUtensorMap& packed, const CUtensorMap& pages,
                                         int kv_head, int entry, int first, Barrier& full) {
  constexpr int kRows = kStepKeys<D>, kShare = kRows / kBlocks;
  const auto load = [&](const CUtensorMap& map, int row, int at) {
#pragma unroll
    for (int panel = 0; panel < D / kPanel; ++panel) {
      E* box = to + (panel * kRows + row) * kPanel;
      if constexpr (kBlocks > 1) {
        LoadBoxForBoth(box, map, panel * kPanel, kv_head, at, full);
      } else {
        LoadBox(box, map, panel * kPanel, kv_head, at, full);
      }
    }
  };
  const int share = kBlocks > 1 ? ClusterRank() * kShare : 0;
  if (entry >= 0) {
    load(packed, share, entry * kKeyTile + first + share);
    return;
  }
  const int* slots = p.schedule.context_slots + p.schedule.context_tiles[~entry].first_piece;
  for (int row = share; row < share + kShare; row += p.piece) {
    const int key = first + row, run = slots[key >> p.run_shift];
    load(pages, row,
         run < 0 ? static_cast<int>(p.no_slot) : run + (key & ((1 << p.run_shift) - 1)));
  }
}

// One thread. Items come from a global counter, longest first; the next one is fetched while this
// one loads.
template <int kBlocks, typename E, int D>
__device__ void Produce(const ForwardParameters& p, ForwardShared<E, D>& s) {
  constexpr int kKeys = kStepKeys<D>;
  Ring<1> items;
  Ring<kStages> ring;
  ItemSource<kBlocks> source(p.counter, s.mail);
  for (;; items.Advance()) {
    const int item = source.Take(p.order.items());
    if (item >= p.order.items()) break;
    const auto [tile_idx, heads] = p.order.at(item);
    const int head = kBlocks > 1 ? heads * kBlocks + ClusterRank() : heads;
    const QueryTileWork tile = p.schedule.query_tiles[tile_idx];
    const int kv_head = head / p.group_size;
    s.q_empty.Wait(items.phase ^ 1);
    s.work = {head, (tile.list_end - tile.list_begin) * kSteps<D>, tile};
    s.q_full.ArriveExpecting(kQueryTile * D * 2);
    LoadTile<D, kQueryTile>(s.q, p.q, head, tile.row_begin, s.q_full);
    const int steps = s.work.count;
    for (int i = 0; i < steps; ++i, ring.Advance()) {
      const int entry = p.schedule.key_tiles[tile.list_begin + i / kSteps<D>], stage = ring.stage;
      const int first = i % kSteps<D> * kKeys;
      s.k_empty[stage].Wait(ring.phase ^ 1);
      s.k_full[stage].ArriveExpecting(kKeys * (D * 2 + 4));
      LoadKeys<kBlocks, D>(p, s.k[stage], p.k, p.context_k, kv_head, entry, first, s.k_full[stage]);
      if (entry >= 0) {
        LoadWords(s.end[stage], p.ends, entry * kKeyTile + first, s.k_full[stage]);
      } else {
        LoadWords(s.end[stage], p.context_ends, p.schedule.context_tiles[~entry].first_end + first,
                  s.k_full[stage]);
      }
      s.v_empty[stage].Wait(ring.phase ^ 1);
      s.v_full[stage].ArriveExpecting(kKeys * D * 2);
      LoadKeys<kBlocks, D>(p, s.v[stage], p.v, p.context_v, kv_head, entry, first, s.v_full[stage]);
    }
  }
  s.q_empty.Wait(items.phase ^ 1);
  s.work.count = -1;
  s.q_full.Arrive();
}

// Zeros in rows [first, end) of a step's swizzled keys: whatever the pages hold there must not meet
// a zero probability. All consumers share the work; rows are whole 128-byte lines, so the swizzle
// does not matter.
template <int D, typename E>
__device__ void ClearRows(E* tile, int first) {
  constexpr int kChunks = kPanel / 8, kRows = kStepKeys<D>;  // 16 bytes each
  const int lines = (D / kPanel) * (kRows - first);
  for (int i = threadIdx.x - 128; i < lines * kChunks; i += 128 * kConsumers) {
    const int line = i / kChunks, panel = line / (kRows - first);
    const int row = first + line - panel * (kRows - first);
    reinterpret_cast<uint4*>(tile + (panel * kRows + row) * kPanel)[i % kChunks] =
        uint4{0, 0, 0, 0};
  }
}

// Ordinary stores of this warpgroup's staged rows up to the tile's last: the rows after it belong
// to another tile.
template <int D, typename E>
__device__ void StoreSomeRows(const ForwardParameters& p, const E* staged, int first,
                              const ForwardWork& work, int column) {
  constexpr int kChunks = kWidth<D> / 8;
  const int row0 = work.tile.row_begin + first, rows = work.tile.row_end - row0;
  for (int i = threadIdx.x % 128; i < rows * kChunks; i += 128) {
    const int row = first + i / kChunks, chunk = i % kChunks, panel = chunk / 8;
    const E* from = staged + (panel * kQueryTile + row) * kPanel + ((chunk % 8) ^ (row & 7)) * 8;
    uint16_t* to =
        p.out + int64_t{row0 + i / kChunks} * p.out_stride + work.head * D + column + chunk * 8;
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
  }
}

// Stages this warpgroup's rows, one part of the columns after the other, and stores them.
template <int D, typename E>
__device__ void StoreOutput(const ForwardParameters& p, E* staged, int group,
                            const ForwardWork& work, const float (&o)[kParts<D>][kWidth<D> / 2],
                            const float (&inverse)[2]) {
  const int epilogue = 1 + group, first_row = work.tile.row_begin + group * 64;
  const bool whole = work.tile.row_end - first_row >= 64 || work.tile.row_end == p.schedule.rows;
#pragma unroll
  for (int part = 0; part < kParts<D>; ++part) {
    // The stores before must have read the staging tile before it is overwritten.
    if (threadIdx.x % 128 == 0) WaitStoresRead();
    NamedSync(epilogue, 128);
    StoreAccumulators<kQueryTile>(staged, group * 64, o[part], inverse[0], inverse[1]);
    FenceAsyncShared();
    NamedSync(epilogue, 128);
    if (!whole) {
      StoreSomeRows<D>(p, staged, group * 64, work, part * kWidth<D>);
    } else if (threadIdx.x % 128 == 0) {
      StoreRows<kWidth<D>, kQueryTile>(p.o, staged, group * 64, work.head, first_row,
                                       part * kWidth<D>);
      CommitStores();
    }
  }
}

template <int kBlocks, typename E, int D>
__device__ void Consume(const ForwardParameters& p, ForwardShared<E, D>& s, int group) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  constexpr int kKeys = kStepKeys<D>;
  const float scale_log2 = p.scale * kLog2e;
  const uint64_t q = ColumnsAreK(s.q + group * 64 * kPanel);
  Ring<1> items;
  Ring<kStages> key_ring, value_ring;

  for (;; items.Advance()) {
    s.q_full.Wait(items.phase);
    const ForwardWork work = s.work;
    if (work.count < 0) break;
    const int row = work.tile.row_begin + group * 64 + warp * 16 + lane / 4;
    const int partial = work.tile.partial * kSteps<D>;
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.f, 0.f}, shrink[2];
    float o[kParts<D>][kWidth<D> / 2], scores[kKeys / 2];
    uint32_t probabilities[kKeys / 4];
    Clear(o);

    // First key of a step that needs the mask; context comes before all rows.
    const auto first_key_of = [&](int i) {
      if (i >= partial) return 0;
      const int entry = p.schedule.key_tiles[work.tile.list_begin + i / kSteps<D>];
      return entry >= 0 ? entry * kKeyTile + i % kSteps<D> * kKeys : -kKeyTile;
    };
    const auto start_scores = [&] {
      s.k_full[key_ring.stage].Wait(key_ring.phase);
      MultiplyAbt<E, D, kQueryTile>(scores, q, ColumnsAreK(s.k[key_ring.stage]));
    };
    const auto start_output = [&] {
      s.v_full[value_ring.stage].Wait(value_ring.phase);
      MultiplyAdd<E, kKeys>(o, probabilities, RowsAreK(s.v[value_ring.stage], kKeys));
    };
    const auto finish_scores = [&](int i, int first_key) {
      Pin(scores);
      if (i < partial) {
        MaskRows(scores, row, first_key, s.end[key_ring.stage], -INFINITY);
        __syncwarp();  // before two lanes release what all have read
      }
      Release<kBlocks>(s.k_empty[key_ring.stage]);
      key_ring.Advance();
      if (i == work.count - 1) s.q_empty.Arrive();
      OnlineSoftmax(scores, m, l, shrink, scale_log2);
    };
    const auto finish_output = [&] {
      WgmmaWait<0>();
      Pin(o);
      Release<kBlocks>(s.v_empty[value_ring.stage]);
      value_ring.Advance();
    };

    // Clears what the pages hold behind the last token of the first entry's step i.
    const auto clear_tail = [&](int i) {
      const int tokens = max(work.tile.tail_tokens - i * kKeys, 0);
      if (i >= kSteps<D> || tokens >= kKeys) return;
      s.v_full[value_ring.stage].Wait(value_ring.phase);
      ClearRows<D>(s.v[value_ring.stage], tokens);
      FenceAsyncShared();
      NamedSync(kAllConsumers, 128 * kConsumers);
    };

    const int first_key0 = first_key_of(0);
    start_scores();
    WgmmaWait<0>();
    finish_scores(0, first_key0);
    PackOperand<E>(probabilities, scores);
    clear_tail(0);
    for (int i = 1; i < work.count; ++i) {
      const int first_key = first_key_of(i);
      start_scores();
      start_output();
      WgmmaWait<1>();
      finish_scores(i, first_key);
      finish_output();
      if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
        for (int part = 0; part < kParts<D>; ++part)
#pragma unroll
          for (int j = 0; j < kWidth<D> / 2; ++j) o[part][j] *= shrink[j / 2 % 2];
      }
      PackOperand<E>(probabilities, scores);
      if constexpr ((kSteps<D>) > 1) clear_tail(i);
    }
    start_output();
    finish_output();

    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      l[h] += __shfl_xor_sync(~0u, l[h], 1);
      l[h] += __shfl_xor_sync(~0u, l[h], 2);
      inverse[h] = 1.f / l[h];
      if (p.lse && lane % 4 == 0 && row + 8 * h < work.tile.row_end)
        p.lse[int64_t{row + 8 * h} * p.q_heads + work.head] = m[h] * p.scale + logf(l[h]);
    }
    StoreOutput<D>(p, s.o, group, work, o, inverse);
  }
  if (threadIdx.x % 128 == 0) WaitStoresRead();
}

template <typename E, int D, int kBlocks>
__global__ void __launch_bounds__(kThreads, 1)
    TreeAttentionForwardKernel(const __grid_constant__ ForwardParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<ForwardShared<E, D>*>(raw);
  if (threadIdx.x == 0) {
    s.q_full.Init(1), s.q_empty.Init(kConsumerThreads);
    for (int i = 0; i < kStages; ++i) {
      s.k_full[i].Init(1), s.k_empty[i].Init(kBlocks * kConsumerWarps);
      s.v_full[i].Init(1), s.v_empty[i].Init(kBlocks * kConsumerWarps);
    }
    if (kBlocks > 1) s.mail.Init();
    FenceBarrierInit();
  }
  SyncBlocks<kBlocks>();
  const int group = Warpgroup();
  if (group == 0) {
    GiveRegisters<40>();
    if (threadIdx.x == 0) Produce<kBlocks>(p, s);
  } else {
    TakeRegisters<kConsumerRegisters<40>>();
    Consume<kBlocks>(p, s, group - 1);
  }
  if constexpr (kBlocks > 1) SyncBlocks<kBlocks>();
}

template <typename E, int D, int kBlocks>
cudaError_t Launch(const TreeAttentionArgs& a, int* counter, cudaStream_t stream) {
  constexpr int kShare = kStepKeys<D> / kBlocks;
  ForwardParameters p{};
  const AttentionShape& shape = a.shape;
  if (auto e = MakeMap(p.q, MapOf(a.q, shape, shape.q_heads), kQueryTile)) return e;
  if (auto e = MakeMap(p.k, MapOf(a.k, shape, shape.kv_heads), kShare)) return e;
  if (auto e = MakeMap(p.v, MapOf(a.v, shape, shape.kv_heads), kShare)) return e;
  if (auto e = MakeMap(p.o, MapOf(a.out, shape, shape.q_heads), 64)) return e;
  if (auto e = MakeEndMaps(p.ends, p.context_ends, a.schedule, kStepKeys<D>)) return e;
  if (a.context.k) {
    const ContextPages& c = a.context;
    const int run_slots = RunSlots(c);
    p.run_shift = std::countr_zero(static_cast<unsigned>(run_slots));
    p.piece = std::min(run_slots, kShare);
    const int64_t slots = c.num_blocks * c.block_tokens, stride = int64_t{shape.kv_heads} * D;
    if (auto e = MakeMap(p.context_k, {c.k, slots, stride, shape.kv_heads, D}, p.piece)) return e;
    if (auto e = MakeMap(p.context_v, {c.v, slots, stride, shape.kv_heads, D}, p.piece)) return e;
    p.no_slot = slots;
  }
  p.schedule = a.schedule;
  p.out = static_cast<uint16_t*>(a.out.data);
  p.out_stride = a.out.row_stride;
  p.lse = a.lse;
  p.counter = counter;
  p.q_heads = shape.q_heads;
  p.group_size = shape.q_heads / shape.kv_heads;
  p.order =
      MakeItemOrder(a.schedule.num_query_tiles, a.schedule.longest_list,
                    a.schedule.num_list_entries, shape.kv_heads, p.group_size / kBlocks, kBlocks);
  p.scale = shape.scale;
  return LaunchPersistent<ForwardShared<E, D>>(TreeAttentionForwardKernel<E, D, kBlocks>, p,
                                               counter, stream, kBlocks);
}

// Two query heads of a KV head make a cluster where their number is even.
template <typename E, int D>
cudaError_t LaunchHeads(const TreeAttentionArgs& a, int* counter, cudaStream_t stream) {
  const bool even = a.shape.q_heads / a.shape.kv_heads % 2 == 0;
  return even ? Launch<E, D, 2>(a, counter, stream) : Launch<E, D, 1>(a, counter, stream);
}

}  // namespace

cudaError_t LaunchTileForward(const TreeAttentionArgs& args, int* counter, cudaStream_t stream) {
  return ForElement(args.shape.dtype, [&](auto element) {
    using E = decltype(element);
    if (args.shape.head_dim == 64) return LaunchHeads<E, 64>(args, counter, stream);
    if (args.shape.head_dim == 128) return LaunchHeads<E, 128>(args, counter, stream);
    if (args.shape.head_dim == 256) return LaunchHeads<E, 256>(args, counter, stream);
    return cudaErrorNotSupported;
  });
}

}  // namespace coppice::cuda
