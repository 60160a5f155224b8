// One kernel for the products between two attentions (layer_chain.h), a block a multiprocessor.
//
// Each product is a phase; between phases lies a barrier of the grid. One warp of a block copies
// its units of weights, of all phases in turn, into a ring and waits for nothing but free stages
// and its own copies: while sums are added up and the barrier is passed, it fetches what comes
// next, fewer units at a time. Another copies rows of x, when they are there; two warpgroups
// multiply: c^T = W x^T, weights as the 64-row operand. A tile's sums that several blocks have are
// exchanged through memory that is filled with kNothing before and after: what is there has come,
// no flag or fence needed.
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
#include "kernels/cuda/layer_chain_phases.cuh"

namespace coppice::cuda {
namespace {

constexpr int64_t kCounterBytes = 256;
constexpr int64_t PieceBytes(int64_t blocks) { return 2 * blocks * kMaxChainRows * 512; }

template <typename Shape>
__global__ void __launch_bounds__(kChainThreads, 1)
    LayerChainKernel(const __grid_constant__ ChainParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<ChainShared<Shape>*>(raw);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) s.w_full[i].Init(1), s.w_empty[i].Init(kChainWarps);
    for (int i = 0; i < Shape::kXStages; ++i) s.x_full[i].Init(1), s.x_empty[i].Init(kChainWarps);
    s.squares_there.Init(1);
    for (Barrier& started : s.started) started.Init(1);
    for (Barrier& full : s.scales_full) full.Init(Shape::kTokens / 4);
    FenceBarrierInit();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp < kChainWarps) {
    MultiplyPhases(p, s);
  } else if (warp == kChainWarps) {
    if (threadIdx.x % 32 == 0) WeightLoader<Shape>{p, s}.Load();
  } else if (warp == kChainWarps + 1) {
    if (threadIdx.x % 32 == 0) LoadTokens(p, s);
  } else {
    WaitForPredecessor();
    ComputeScales(p, s);
  }
}

// 128 weight rows by 64 columns: neighbours, or halves by turns: 8 rows of gate before the same 8
// of up where the product is [gate | up], 8 of a head's first half before the same 8 of its second
// where heads are rotated, so that a thread has both sums of what belongs together.
cudaError_t MakeWeightMap(ChainPhase& phase, const ChainMatrix& w, int64_t n, int64_t k,
                          int64_t head_dim) {
  const auto encode = TensorMapEncoder();
  if (!encode) return cudaErrorNotSupported;
  const auto size = [](int64_t x) { return static_cast<cuuint64_t>(x); };
  const bool gated = phase.step == ChainStep::kSwiGlu, rotated = phase.step == ChainStep::kRotate;
  // Rows of a whole that has two halves, and such wholes.
  const int64_t whole = gated ? n : rotated ? head_dim : 2 * n, wholes = rotated ? n / whole : 1;
  const bool halves = gated || rotated;
  phase.tile_rows = halves ? 0 : kTileRows, phase.tile_groups = gated ? 8 : 0;
  phase.tile_heads = rotated ? kTileRows / static_cast<int>(whole) : 0;
  const cuuint64_t row = size(w.stride) * 2;
  const cuuint64_t extent[5] = {size(k), size(halves ? 8 : n), halves ? 2u : 1u,
                                size(halves ? whole / 16 : 1), size(wholes)};
  const cuuint64_t stride[4] = {row, row * size(whole / 2), row * 8, row * size(whole)};
  const auto box_groups = static_cast<cuuint32_t>(gated ? 8 : rotated ? whole / 16 : 1);
  const cuuint32_t box[5] = {kColumns, halves ? 8u : kTileRows, halves ? 2u : 1u, box_groups,
                             rotated ? kTileRows / static_cast<cuuint32_t>(whole) : 1u};
  const cuuint32_t step[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(&phase.w, CU_TENSOR_MAP_DATA_TYPE_UINT16, 5, const_cast<void*>(w.data), extent, stride,
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
                      int blocks, int64_t head_dim, int& rotation) {
  const bool gated = product.step == ChainStep::kSwiGlu;
  phase.step = product.step;
  phase.tiles = static_cast<int>((product.n + kTileRows - 1) / kTileRows);
  phase.k_blocks = static_cast<int>((product.k + kColumns - 1) / kColumns);
  const int units = phase.tiles * phase.k_blocks;
  phase.shortest = units / blocks, phase.longer = units % blocks;
  phase.rotation = rotation;
  rotation = (rotation + phase.longer) % blocks;
  phase.columns = static_cast<int>(gated ? product.n / 2 : product.n);
  if (const cudaError_t e = MakeWeightMap(phase, product.w, product.n, product.k, head_dim))
    return e;
  const MapShape x = {product.x, rows, product.x_stride, 1, static_cast<int32_t>(product.k)};
  return MakeMap(phase.x, x, tokens);
}

// For `tokens` rows of x at most.
cudaError_t MakeChainParameters(ChainParameters& p, const LayerChainArgs& a,
                                const LayerChainMemory& memory, int tokens) {
  const int blocks = memory.blocks;
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
    if (const cudaError_t e = MakePhase(p.phases[i], products[i], a.rows, tokens, blocks,
                                        a.rotation.head_dim, rotation))
      return e;
  }
  p.phases[0].Adds(a.input, a.input_stride, a.mid, a.mid_stride);
  p.phases[0].Norms(a.mlp_norm, a.mlp_in, a.mlp_in_stride);
  p.phases[1].Stores(a.act, a.act_stride);
  p.phases[2].Adds(a.mid, a.mid_stride, a.output, a.output_stride);
  if (p.num_phases == 4) p.phases[2].Norms(a.next_norm, a.attn_in, a.attn_in_stride);
  p.phases[3].Stores(a.qkv_out, a.qkv_out_stride);
  p.phases[3].factor = a.qkv_bias;
  return cudaSuccess;
}

template <typename Shape>
cudaError_t Launch(const LayerChainArgs& a, const LayerChainMemory& memory, cudaStream_t stream) {
  static_assert(sizeof(ChainShared<Shape>) <= 227 << 10);
  ChainParameters p = {};
  if (const cudaError_t e = MakeChainParameters(p, a, memory, Shape::kTokens)) return e;
  const OverlappedGrid grid = {dim3(static_cast<unsigned>(memory.blocks)), kChainThreads,
                               sizeof(ChainShared<Shape>)};
  return LaunchOverlapped<LayerChainKernel<Shape>>(grid, stream, p);
}

template <typename E>
using Shape8 = ChainShape<E, 8, 13, 12>;
template <typename E>
using Shape16 = ChainShape<E, 16, 13, 6>;
template <typename E>
using Shape32 = ChainShape<E, 32, 12, 7>;
template <typename E>
using Shape64 = ChainShape<E, 64, 10, 7>;

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
    resident.template operator()<Shape64<E>>();
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
    if (args.rows <= 32) return Launch<Shape32<E>>(args, memory, stream);
    return Launch<Shape64<E>>(args, memory, stream);
  });
}

}  // namespace coppice::cuda
