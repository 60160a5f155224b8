// One kernel for the products between two attentions (layer_chain.h), a block a multiprocessor.
//
// Each product is a phase; between phases lies a barrier of the grid. One warp of a block copies
// its units of weights, of all phases in turn, into a ring and waits for nothing but free stages:
// while sums are added up and the barrier is passed, it fetches what comes next. Another copies
// rows of x, when they are there; two warpgroups multiply: c^T = W x^T, weights as the 64-row
// operand. A tile's sums that several blocks have are exchanged through memory that is filled with
// kNothing before and after: what is there has come, no flag or fence needed.
//
// RmsNorm(x) W^T = rstd * (x * norm) W^T: x * norm (times kNormedUnit) is what the residual step
// stores beside x, with sums of squares; rstd multiplies the next product's sums.
//
// Progress. All blocks are resident: the grid is as large as the device, nothing that comes later
// starts before all have passed the last barrier (LetSuccessorStart), and what came before ends by
// itself. A block waits for its predecessor kernels; for sums that other blocks send in the same
// phase, before they wait for any of that phase; and for the grid, at which each block arrives once
// it has what it waited for.
//
// Traffic: the weights once; bound by memory.
#include "kernels/cuda/layer_chain_sums.cuh"

namespace coppice::cuda {
namespace {

constexpr int64_t kCounterBytes = 256;
constexpr int64_t PieceBytes(int64_t blocks) { return 2 * blocks * kMaxChainRows * 512; }

__device__ __forceinline__ uint64_t EvictFirst() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A unit of weights, which no other block reads.
__device__ __forceinline__ void LoadUnit(void* to, const CUtensorMap& map, int column, int row,
                                         int group, Barrier& full, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(0), "r"(group), "r"(SharedAddress(&full.word)),
      "l"(policy)
      : "memory");
}

template <typename Shape>
__device__ void LoadWeights(const ChainParameters& p, ChainShared<Shape>& s) {
  Ring<Shape::kStages> ring, landed;
  int in_flight = 0;
  const uint64_t policy = EvictFirst();
  for (int i = 0; i < p.num_phases; ++i) {
    const ChainPhase& phase = p.phases[i];
    const Run run(phase);
    int tile = run.begin / phase.k_blocks, block = run.begin % phase.k_blocks;
    for (int unit = run.begin; unit < run.end; ++unit, ring.Advance()) {
      if (in_flight == kInFlight) {
        s.w_full[landed.stage].Wait(landed.phase);
        landed.Advance();
      } else {
        ++in_flight;
      }
      s.w_empty[ring.stage].Wait(ring.phase ^ 1);
      s.w_full[ring.stage].ArriveExpecting(kUnitBytes);
      LoadUnit(s.w[ring.stage], phase.w, block * kColumns, tile * phase.tile_rows,
               tile * phase.tile_groups, s.w_full[ring.stage], policy);
      if (++block == phase.k_blocks) block = 0, ++tile;
    }
  }
}

__device__ __forceinline__ unsigned LoadAcquire(const unsigned* from) {
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void AddRelease(unsigned* to) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(to) : "memory");
}

// By one thread: until all blocks have arrived at barrier i of the launch.
__device__ __forceinline__ void WaitForGrid(const ChainParameters& p, int i) {
  while (LoadAcquire(p.counters + i) < gridDim.x) {
  }
  asm volatile("fence.proxy.async.global;" ::
                   : "memory");  // what others stored is read by bulk copies
}

// By one thread of each block, past the last barrier: the last one leaves the counters as they
// were.
__device__ __forceinline__ void LeaveGrid(const ChainParameters& p) {
  if (atomicAdd(p.counters + kMaxPhases, 1) < gridDim.x - 1) return;
  for (int i = 0; i <= kMaxPhases; ++i) p.counters[i] = 0;
}

template <typename Shape>
__device__ void LoadTokens(const ChainParameters& p, ChainShared<Shape>& s) {
  Ring<Shape::kXStages> ring;
  WaitForPredecessor();
  for (int i = 0; i < p.num_phases; ++i) {
    const ChainPhase& phase = p.phases[i];
    if (i > 0) {
      WaitForGrid(p, i - 1);
      if (phase.step != ChainStep::kResidual) s.squares_there.Arrive();
    }
    if (i == p.num_phases - 1) {
      LetSuccessorStart();
      LeaveGrid(p);
    }
    const Run run(phase);
    int block = run.begin % phase.k_blocks;
    for (int unit = run.begin; unit < run.end; ++unit, ring.Advance()) {
      s.x_empty[ring.stage].Wait(ring.phase ^ 1);
      s.x_full[ring.stage].ArriveExpecting(Shape::kXStageBytes);
      LoadBox(s.x[ring.stage], phase.x, block * kColumns, 0, 0, s.x_full[ring.stage]);
      if (++block == phase.k_blocks) block = 0;
    }
  }
}

// By one warp: rstd of every token from the sums of squares of the phase before, for phases 1 and
// 3, each at a place and with a barrier of its own.
template <typename Shape>
__device__ void ComputeScales(const ChainParameters& p, ChainShared<Shape>& s) {
  constexpr int kLanes = Shape::kTokens / 4, kRows = 32 / kLanes;  // lanes a row, rows together
  constexpr int kAhead = Shape::kTokens == 8 ? 10 : 20;            // rows of a lane, read together
  const int lane = threadIdx.x % 32;
  uint32_t parity = 0;
  for (int i = 1; i < p.num_phases; ++i) {
    if (p.phases[i].step == ChainStep::kResidual) continue;
    s.squares_there.Wait(parity);
    parity ^= 1;
    const auto* squares = reinterpret_cast<const float4*>(p.squares);
    float4 sum = {0.f, 0.f, 0.f, 0.f};
    for (int row = lane / kLanes; row < p.square_rows; row += kRows * kAhead) {
      float4 x[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int at = row + k * kRows;
        x[k] = at < p.square_rows ? __ldcg(squares + at * kLanes + lane % kLanes) : float4{};
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        sum.x += x[k].x, sum.y += x[k].y, sum.z += x[k].z, sum.w += x[k].w;
    }
#pragma unroll
    for (int d = kLanes; d < 32; d *= 2) {
      sum.x += __shfl_xor_sync(~0u, sum.x, d), sum.y += __shfl_xor_sync(~0u, sum.y, d);
      sum.z += __shfl_xor_sync(~0u, sum.z, d), sum.w += __shfl_xor_sync(~0u, sum.w, d);
    }
    if (lane < kLanes) {
      const float4 mean = {sum.x * p.inverse_hidden, sum.y * p.inverse_hidden,
                           sum.z * p.inverse_hidden, sum.w * p.inverse_hidden};
      constexpr float kBack = 1.f / kNormedUnit<typename Shape::Element>;
      reinterpret_cast<float4*>(s.scales[i / 2])[lane] = {
          rsqrtf(mean.x + p.eps) * kBack, rsqrtf(mean.y + p.eps) * kBack,
          rsqrtf(mean.z + p.eps) * kBack, rsqrtf(mean.w + p.eps) * kBack};
      s.scales_full[i / 2].Arrive();  // every writer for itself: so racecheck can follow
    }
  }
}

template <typename Shape>
struct Multiplier {
  ChainShared<Shape>& s;
  Ring<Shape::kStages> w_ring;
  Ring<Shape::kXStages> x_ring;

  // Adds `units` units to this warpgroup's panel. Element 4j + 2h + e of the sums is weight row
  // 16 warp + lane / 4 + 8 h, token 8j + 2 (lane % 4) + e.
  __device__ __forceinline__ void Multiply(int units, float (&sum)[Shape::kTokens / 2]) {
    Start<false>(sum);
    for (int i = 1; i < units; ++i) {
      const int w_used = w_ring.stage, x_used = x_ring.stage;
      w_ring.Advance();
      x_ring.Advance();
      Start<true>(sum);
      WgmmaWait<1>();
      Release(w_used, x_used);
    }
    WgmmaWait<0>();
    Release(w_ring.stage, x_ring.stage);
    w_ring.Advance();
    x_ring.Advance();
    Pin(sum);
  }

 private:
  template <bool kAdd>
  __device__ __forceinline__ void Start(float (&sum)[Shape::kTokens / 2]) {
    s.x_full[x_ring.stage].Wait(x_ring.phase);
    s.w_full[w_ring.stage].Wait(w_ring.phase);
    const int panel = threadIdx.x / kMultipliers;
    const uint64_t w = ColumnsAreK(s.w[w_ring.stage] + panel * kPanelRows * kColumns * 2);
    const uint64_t x = ColumnsAreK(s.x[x_ring.stage]);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kColumns; k += 16)
      WgmmaStep<typename Shape::Element>(sum, Advanced(w, k * 2), Advanced(x, k * 2),
                                         kAdd || k > 0);
    WgmmaCommit();
  }
  __device__ __forceinline__ void Release(int w_stage, int x_stage) {
    if (threadIdx.x % 32 != 0) return;
    s.w_empty[w_stage].Arrive();
    s.x_empty[x_stage].Arrive();
  }
};

template <typename Shape>
__device__ void MultiplyPhases(const ChainParameters& p, ChainShared<Shape>& s) {
  Multiplier<Shape> multiplier = {s};
  WaitForPredecessor();
  for (int i = 0; i < p.num_phases; ++i) {
    const ChainPhase& phase = p.phases[i];
    const Run run(phase);
    bool has_scales = phase.step == ChainStep::kResidual;
    const auto wait_for_scales = [&] {
      if (!has_scales) s.scales_full[i / 2].Wait(0);
      has_scales = true;
    };
    for (int unit = run.begin; unit < run.end;) {
      const Piece piece(phase, run, unit);
      float sum[Shape::kTokens / 2];
      multiplier.Multiply(piece.end - unit, sum);
      unit = piece.end;
      wait_for_scales();
      FinishPiece(p, phase, s, piece, sum);
    }
    wait_for_scales();  // so that ComputeScales is never a phase behind
    if (i + 1 < p.num_phases) {
      NamedSync(1, kChainMultipliers);
      if (threadIdx.x == 0) AddRelease(p.counters + i);
    }
  }
}

template <typename Shape>
__global__ void __launch_bounds__(kChainThreads, 1)
    LayerChainKernel(const __grid_constant__ ChainParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<ChainShared<Shape>*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) s.w_full[i].Init(1), s.w_empty[i].Init(kChainWarps);
    for (int i = 0; i < Shape::kXStages; ++i) s.x_full[i].Init(1), s.x_empty[i].Init(kChainWarps);
    s.squares_there.Init(1);
    for (Barrier& full : s.scales_full) full.Init(Shape::kTokens / 4);
    FenceBarrierInit();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp < kChainWarps) {
    MultiplyPhases(p, s);
  } else if (warp == kChainWarps) {
    if (threadIdx.x % 32 == 0) LoadWeights(p, s);
  } else if (warp == kChainWarps + 1) {
    if (threadIdx.x % 32 == 0) LoadTokens(p, s);
  } else {
    WaitForPredecessor();
    ComputeScales(p, s);
  }
}

// 128 weight rows by 64 columns: neighbours, or where the product is [gate | up] 64 of each, 8 rows
// of gate before the same 8 of up, so that a thread has both sums of a column.
cudaError_t MakeWeightMap(CUtensorMap& map, const ChainMatrix& w, int64_t n, int64_t k,
                          bool gated) {
  const auto encode = TensorMapEncoder();
  if (!encode) return cudaErrorNotSupported;
  const auto size = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const uint32_t rows = gated ? 8 : kTileRows;
  const cuuint64_t extent[4] = {size(k), size(gated ? 8 : n), size(gated ? 2 : 1),
                                size(gated ? n / 16 : 1)};
  const cuuint64_t row = size(w.stride) * 2;
  const cuuint64_t stride[3] = {row, row * size(gated ? n / 2 : n), row * 8};
  const cuuint32_t box[4] = {kColumns, rows, gated ? 2u : 1u, gated ? 8u : 1u};
  const cuuint32_t step[4] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(w.data), extent, stride,
             box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct ChainProduct {
  ChainMatrix w;
  int64_t n, k;
  const void* x;
  int64_t x_stride;
  ChainStep step;
};

// Shares out a product's units after `rotation` longer runs of those before; adds its own.
cudaError_t MakePhase(ChainPhase& phase, const ChainProduct& product, int64_t rows, int tokens,
                      int blocks, int& rotation) {
  const bool gated = product.step == ChainStep::kSwiGlu;
  phase.step = product.step;
  phase.tiles = static_cast<int>((product.n + kTileRows - 1) / kTileRows);
  phase.k_blocks = static_cast<int>((product.k + kColumns - 1) / kColumns);
  phase.tile_rows = gated ? 0 : kTileRows, phase.tile_groups = gated ? 8 : 0;
  const int units = phase.tiles * phase.k_blocks;
  phase.shortest = units / blocks, phase.longer = units % blocks;
  phase.rotation = rotation;
  rotation = (rotation + phase.longer) % blocks;
  phase.columns = static_cast<int>(gated ? product.n / 2 : product.n);
  if (const cudaError_t e = MakeWeightMap(phase.w, product.w, product.n, product.k, gated))
    return e;
  const MapShape x = {product.x, rows, product.x_stride, 1, static_cast<int32_t>(product.k)};
  return MakeMap(phase.x, x, tokens);
}

template <typename Shape>
cudaError_t Launch(const LayerChainArgs& a, const LayerChainMemory& memory, cudaStream_t stream) {
  static_assert(sizeof(ChainShared<Shape>) <= 227 << 10);
  const int blocks = memory.blocks;
  ChainParameters p = {};
  p.num_phases = a.qkv.data != nullptr ? 4 : 3;
  p.rows = static_cast<int>(a.rows);
  p.eps = a.eps, p.inverse_hidden = 1.f / static_cast<float>(a.hidden);
  p.square_rows = static_cast<int>((a.hidden + kTileRows - 1) / kTileRows) * kChainWarps;
  p.rotation = a.rotation;
  p.counters = static_cast<unsigned*>(memory.data);
  p.pieces = reinterpret_cast<float4*>(static_cast<char*>(memory.data) + kCounterBytes);
  p.squares = reinterpret_cast<float*>(static_cast<char*>(memory.data) + kCounterBytes +
                                       PieceBytes(blocks));
  const ChainProduct products[kMaxPhases] = {
      {a.o, a.hidden, a.attn_columns, a.attn_out, a.attn_out_stride, ChainStep::kResidual},
      {a.gate_up, 2 * a.ffn, a.hidden, a.mlp_in, a.mlp_in_stride, ChainStep::kSwiGlu},
      {a.down, a.hidden, a.ffn, a.act, a.act_stride, ChainStep::kResidual},
      {a.qkv, a.qkv_columns, a.hidden, a.attn_in, a.attn_in_stride,
       a.rotation.positions != nullptr ? ChainStep::kRotate : ChainStep::kProject}};
  int rotation = 0;
  for (int i = 0; i < p.num_phases; ++i) {
    if (const cudaError_t e =
            MakePhase(p.phases[i], products[i], a.rows, Shape::kTokens, blocks, rotation))
      return e;
  }
  p.phases[0].Adds(a.input, a.input_stride, a.mid, a.mid_stride);
  p.phases[0].Norms(a.mlp_norm, a.mlp_in, a.mlp_in_stride);
  p.phases[1].Stores(a.act, a.act_stride);
  p.phases[2].Adds(a.mid, a.mid_stride, a.output, a.output_stride);
  if (p.num_phases == 4) p.phases[2].Norms(a.next_norm, a.attn_in, a.attn_in_stride);
  p.phases[3].Stores(a.qkv_out, a.qkv_out_stride);
  p.phases[3].factor = a.qkv_bias;
  const OverlappedGrid grid = {dim3(static_cast<unsigned>(blocks)), kChainThreads,
                               sizeof(ChainShared<Shape>)};
  return LaunchOverlapped<LayerChainKernel<Shape>>(grid, stream, p);
}

template <typename E>
using Shape8 = ChainShape<E, 8, 13, 12>;
template <typename E>
using Shape16 = ChainShape<E, 16, 13, 6>;
template <typename E>
using Shape32 = ChainShape<E, 32, 12, 7>;

}  // namespace

cudaError_t CountChainBlocks(int& blocks) {
  blocks = 0;
  int device = 0, multiprocessors = 0, least = 1;
  if (const cudaError_t e = cudaGetDevice(&device)) return e;
  if (const cudaError_t e =
          cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
    return e;
  cudaError_t error = cudaSuccess;
  const auto resident = [&]<typename Shape>() {
    int count = 0;
    if (error == cudaSuccess)
      error =
          cudaFuncSetAttribute(LayerChainKernel<Shape>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               sizeof(ChainShared<Shape>));
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &count, LayerChainKernel<Shape>, kChainThreads, sizeof(ChainShared<Shape>));
    least = count < least ? count : least;
  };
  const auto all_resident = [&]<typename E>() {
    resident.template operator()<Shape8<E>>();
    resident.template operator()<Shape16<E>>();
    resident.template operator()<Shape32<E>>();
  };
  all_resident.template operator()<Bf16>();
  all_resident.template operator()<F16>();
  if (error == cudaSuccess && least > 0) blocks = multiprocessors;
  return error;
}

int64_t LayerChainMemoryBytes(int blocks) {
  const int64_t tiles = kMaxChainHidden / kTileRows;
  return kCounterBytes + PieceBytes(blocks) + tiles * kChainWarps * kMaxChainRows * 4;
}

cudaError_t InitLayerChainMemory(const LayerChainMemory& memory, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(LayerChainMemoryBytes(memory.blocks));
  if (const cudaError_t e = cudaMemsetAsync(memory.data, 0xff, bytes, stream)) return e;
  return cudaMemsetAsync(memory.data, 0, kCounterBytes, stream);
}

cudaError_t LaunchLayerChain(const LayerChainArgs& args, const LayerChainMemory& memory,
                             cudaStream_t stream) {
  return ForElement(args.dtype, [&]<typename E>(E) {
    if (args.rows <= 8) return Launch<Shape8<E>>(args, memory, stream);
    if (args.rows <= 16) return Launch<Shape16<E>>(args, memory, stream);
    return Launch<Shape32<E>>(args, memory, stream);
  });
}

}  // namespace coppice::cuda
