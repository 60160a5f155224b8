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
#include "kernels/cuda/layer_chain_parameters.cuh"
#include "kernels/cuda/layer_chain_phases.cuh"

namespace coppice::cuda {
namespace {

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
    MultiplyPhases(p, s, Ring<Shape::kStages>());
  } else if (warp == kChainWarps) {
    if (threadIdx.x % 32 == 0) {
      UnitStages<Shape> stages;
      LoadWeights(p, s, stages);
    }
  } else if (warp == kChainWarps + 1) {
    if (threadIdx.x % 32 == 0) LoadTokens(p, s);
  } else {
    WaitForPredecessor();
    ComputeScales(p, s);
  }
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
