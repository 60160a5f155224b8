// Few rows times weights on wgmma + TMA, transposed: c^T = W x^T, weights as the 64-row operand,
// tokens as 8 or 16 columns.
//
// With a norm, RmsNorm(x) W^T = rstd * (x * norm) W^T: x * norm is rounded to bf16 on its way into
// shared memory, the sum of squares is gathered beside it, and rstd multiplies the result.
//
// A cluster of 1 to 8 blocks takes a tile of 64 or 128 weight rows, each block an equal share of
// its columns; then every block adds a share of the tile's sums over the blocks, in order, and
// stores it. Warps: four multiply and store, two bring x, one issues the weight copies.
// Those do not wait for the kernel before, so memory stays busy between kernels. Traffic: 2 n k
// bytes; bound by memory.
#include "kernels/cuda/attention/hopper.cuh"
#include "kernels/cuda/attention/tensor_map.cuh"
#include "kernels/cuda/overlap.cuh"
#include "kernels/cuda/skinny_matmul.h"

namespace coppice::cuda {
namespace {

constexpr int kColumns = 64;       // of W and x in one step
constexpr int kPanelRows = 64;     // weight rows of one product; a tile has one or two panels
constexpr int kMultipliers = 128;  // threads

struct SkinnyParameters {
  CUtensorMap w;
  SkinnyArgs args;
  int k_blocks;
  int panel_stride;  // weight rows from a tile's first panel to its second
  int tile_stride;   // weight rows from tile to tile
  int out_columns;   // columns of c
};

// Threads and shared memory of a block. Several fit a multiprocessor, so that the next kernel's
// blocks are at work before this one's have ended.
template <int kTokens, int kPanels>
struct SkinnyShape {
  static constexpr int kLoaders = 64;  // threads that bring x
  static constexpr int kThreads = kMultipliers + kLoaders + 32;
  static constexpr int kResident = 4;  // blocks that fit a multiprocessor
  static constexpr int kXStages = 4;
  static constexpr int kStageBytes = kPanels * kPanelRows * kColumns * 2;
  static constexpr int kBudgetBytes = 52 << 10;
  static constexpr int kStages = (kBudgetBytes - kXStages * kTokens * kColumns * 2) / kStageBytes;
};

template <int kTokens, int kPanels>
struct SkinnyShared {
  using Shape = SkinnyShape<kTokens, kPanels>;
  union {
    alignas(1024) Bf16 w[Shape::kStages][kPanels][kPanelRows * kColumns];
    // Afterwards: element [panel][j][h] of a thread, tokens 2 (lane % 4) and the next.
    float2 sums[kPanels][kTokens / 8][2][kMultipliers];
  };
  alignas(1024) Bf16 x[Shape::kXStages][kTokens * kColumns];
  float squares[kTokens];
  Barrier w_full[Shape::kStages], w_empty[Shape::kStages];
  Barrier x_full[Shape::kXStages], x_empty[Shape::kXStages];
};

__device__ __forceinline__ int ClusterRank() {
  int rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ int ClusterSize() {
  int size;
  asm("mov.u32 %0, %cluster_nctarank;" : "=r"(size));
  return size;
}
// Until every thread of the cluster that is left came here; what they wrote is visible.
__device__ __forceinline__ void ClusterSync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Reads another block's copy of a variable in shared memory.
__device__ __forceinline__ float2 ReadFrom(int rank, const float2* p) {
  float2 x;
  asm volatile(
      "{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %2, %3;\n"
      "ld.shared::cluster.v2.f32 {%0, %1}, [at];\n}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(SharedAddress(p)), "r"(rank)
      : "memory");
  return x;
}

// This block's share of a tile's column blocks.
struct ColumnBlocks {
  int begin, end;
  __device__ explicit ColumnBlocks(const SkinnyParameters& p)
      : begin(p.k_blocks * ClusterRank() / ClusterSize()),
        end(p.k_blocks * (ClusterRank() + 1) / ClusterSize()) {}
};

template <int kTokens, int kPanels>
__device__ void LoadWeights(const SkinnyParameters& p, SkinnyShared<kTokens, kPanels>& s) {
  Ring<SkinnyShape<kTokens, kPanels>::kStages> ring;
  const ColumnBlocks blocks(p);
  if (!p.args.w_is_parameter) WaitForPredecessor();
  for (int b = blocks.begin; b < blocks.end; ++b, ring.Advance()) {
    s.w_empty[ring.stage].Wait(ring.phase ^ 1);
    s.w_full[ring.stage].ArriveExpecting(sizeof(s.w[0]));
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      LoadBox(s.w[ring.stage][panel], p.w, b * kColumns, 0,
              blockIdx.y * p.tile_stride + panel * p.panel_stride, s.w_full[ring.stage]);
  }
}

// What one thread holds of one step of x: pieces of 8 columns of every kStride-th token.
template <typename X, int kCount, int kStride>
struct Pieces {
  static constexpr int kWords = sizeof(X) / 2;
  uint4 x[kCount][kWords], norm;

  __device__ __forceinline__ void Read(const SkinnyArgs& a, int token, int column) {
    const bool inside = column < a.k;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = token + kStride * i;
      const auto* from =
          reinterpret_cast<const uint4*>(static_cast<const X*>(a.x) + row * a.x_stride + column);
#pragma unroll
      for (int j = 0; j < kWords; ++j)
        x[i][j] = inside && row < a.rows ? __ldcg(from + j) : uint4{};
    }
    if (a.norm == nullptr) return;
    const auto* weight = static_cast<const Bf16*>(a.norm) + column;
    norm = inside ? *reinterpret_cast<const uint4*>(weight) : uint4{};
  }
};

__device__ __forceinline__ float2 PairAt(const uint4 (&x)[1], int i) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162*>(x)[i]);
}
__device__ __forceinline__ float2 PairAt(const uint4 (&x)[2], int i) {
  return reinterpret_cast<const float2*>(x)[i];
}

// x * norm, and the sum of squares of x.
template <int kWords>
__device__ __forceinline__ uint4 Scale(const uint4 (&x)[kWords], const uint4& norm,
                                       float& squares) {
  uint4 y;
  const auto* by = reinterpret_cast<const __nv_bfloat162*>(&norm);
  auto* to = reinterpret_cast<uint32_t*>(&y);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = PairAt(x, i), w = __bfloat1622float2(by[i]);
    squares += v.x * v.x + v.y * v.y;
    to[i] = PackBf16(v.x * w.x, v.y * w.y);
  }
  return y;
}

template <typename X, int kTokens, int kPanels>
__device__ void LoadTokens(const SkinnyParameters& p, SkinnyShared<kTokens, kPanels>& s) {
  using Shape = SkinnyShape<kTokens, kPanels>;
  constexpr int kAhead = kTokens * sizeof(X) > 32 ? 2 : kTokens * sizeof(X) == 32 ? 3 : 4;
  constexpr int kStride = Shape::kLoaders / 8, kCount = kTokens / kStride;
  const int thread = threadIdx.x - kMultipliers, token = thread / 8, piece = thread % 8;
  const ColumnBlocks blocks(p);
  Pieces<X, kCount, kStride> pieces[kAhead];  // steps on their way
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    pieces[i].Read(p.args, token, min(blocks.begin + i, p.k_blocks) * kColumns + piece * 8);
  float squares[kCount] = {};
  Ring<Shape::kXStages> ring;
  for (int first = blocks.begin; first < blocks.end; first += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int b = first + i;
      if (b >= blocks.end) break;
      s.x_empty[ring.stage].Wait(ring.phase ^ 1);
      const uint32_t at =
          SharedAddress(s.x[ring.stage]) + token * 128 + ((piece ^ (token & 7)) << 4);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        uint4 y = pieces[i].x[j][0];
        if (p.args.norm != nullptr) y = Scale(pieces[i].x[j], pieces[i].norm, squares[j]);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at + j * kStride * 128),
                     "r"(y.x), "r"(y.y), "r"(y.z), "r"(y.w)
                     : "memory");
      }
      if (b + kAhead < blocks.end)
        pieces[i].Read(p.args, token, (b + kAhead) * kColumns + piece * 8);
      if (b + 1 == blocks.end) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          for (int d = 1; d < 8; d *= 2) squares[j] += __shfl_xor_sync(~0u, squares[j], d);
          if (piece == 0) s.squares[token + kStride * j] = squares[j];
        }
      }
      FenceAsyncShared();
      __syncwarp();
      if (threadIdx.x % 32 == 0) s.x_full[ring.stage].Arrive();
      ring.Advance();
    }
  }
}

// One k16 step of 64 weight rows by 8 or 16 tokens.
__device__ __forceinline__ void WgmmaStep(float (&d)[4], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, "
      "0;\n}"
      : HOPPER_ACC4(d, 0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
__device__ __forceinline__ void WgmmaStep(float (&d)[8], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, "
      "%9, p, 1, 1, 0, 0;\n}"
      : HOPPER_ACC8(d, 0)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
// Sums of this block's columns: element 4j + 2h + e of a panel is weight row
// 16 warp + lane / 4 + 8 h, token 8j + 2 (lane % 4) + e.
template <int kTokens, int kPanels>
__device__ void MultiplyColumns(const SkinnyParameters& p, SkinnyShared<kTokens, kPanels>& s,
                                float (&sum)[kPanels][kTokens / 2]) {
  using Shape = SkinnyShape<kTokens, kPanels>;
  Ring<Shape::kStages> w_ring;
  Ring<Shape::kXStages> x_ring;
  const ColumnBlocks blocks(p);
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (float& x : sum[panel]) x = 0.f;
  }
  for (int b = blocks.begin; b < blocks.end; ++b) {
    s.x_full[x_ring.stage].Wait(x_ring.phase);
    s.w_full[w_ring.stage].Wait(w_ring.phase);
    const uint64_t x = ColumnsAreK(s.x[x_ring.stage]);
    WgmmaFence();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const uint64_t w = ColumnsAreK(s.w[w_ring.stage][panel]);
#pragma unroll
      for (int k = 0; k < kColumns; k += 16)
        WgmmaStep(sum[panel], Advanced(w, k * 2), Advanced(x, k * 2), true);
    }
    WgmmaCommit();
    WgmmaWait<0>();
    if (threadIdx.x % 32 == 0) {
      s.w_empty[w_ring.stage].Arrive();
      s.x_empty[x_ring.stage].Arrive();
    }
    w_ring.Advance();
    x_ring.Advance();
  }
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) Pin(sum[panel]);
}

__device__ __forceinline__ float2 LoadPair(const void* from, int64_t at, bool is_f32) {
  if (is_f32) return __ldcg(reinterpret_cast<const float2*>(static_cast<const float*>(from) + at));
  const uint32_t word =
      __ldcg(reinterpret_cast<const uint32_t*>(static_cast<const Bf16*>(from) + at));
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
}

// Stores columns `column` and the next of one token.
__device__ __forceinline__ void StorePair(const SkinnyArgs& a, int token, int column, float2 y) {
  if (a.bias != nullptr) {
    const float2 bias = LoadPair(a.bias, column, false);
    y.x += bias.x, y.y += bias.y;
  }
  if (a.addend != nullptr) {
    const float2 addend = LoadPair(a.addend, token * a.addend_stride + column, a.c_is_f32);
    y.x += addend.x, y.y += addend.y;
  }
  const int64_t at = token * a.c_stride + column;
  if (a.c_is_f32) {
    *reinterpret_cast<float2*>(static_cast<float*>(a.c) + at) = y;
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<Bf16*>(a.c) + at) = PackBf16(y.x, y.y);
  }
}

// Lanes 4 apart hold neighbouring columns of c: each takes both of one token.
__device__ __forceinline__ void StorePanel(const SkinnyParameters& p, int j, int h, int column0,
                                           float even_token, float odd_token) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, odd = lane / 4 % 2;
  const float other = __shfl_xor_sync(~0u, odd ? even_token : odd_token, 4);
  const float2 pair = odd ? float2{other, odd_token} : float2{even_token, other};
  const int token = 8 * j + lane % 4 * 2 + odd;
  const int column = column0 + 16 * warp + lane / 8 * 2 + 8 * h;
  if (token < p.args.rows && column < p.out_columns) StorePair(p.args, token, column, pair);
}

// The tile's sums of one (j, h), and of the squares of its two tokens, over the cluster.
template <int kTokens, int kPanels>
struct PairSums {
  float2 sum[kPanels] = {}, squares = {};

  __device__ __forceinline__ void Add(const SkinnyShared<kTokens, kPanels>& s, int rank, int j,
                                      int h) {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const float2 x = ReadFrom(rank, &s.sums[panel][j][h][threadIdx.x]);
      sum[panel].x += x.x, sum[panel].y += x.y;
    }
    const int token = 8 * j + threadIdx.x % 4 * 2;
    const float2 x = ReadFrom(rank, reinterpret_cast<const float2*>(s.squares + token));
    squares.x += x.x, squares.y += x.y;
  }
};

__device__ __forceinline__ float Silu(float x) { return x / (1.f + __expf(-x)); }

template <bool kSwiGlu, int kTokens, int kPanels>
__device__ __forceinline__ void StorePairs(const SkinnyParameters& p, int j, int h,
                                           PairSums<kTokens, kPanels> t) {
  const SkinnyArgs& a = p.args;
  if (a.norm != nullptr) {
    const float inverse_k = 1.f / static_cast<float>(a.k);
    const float2 rstd = {rsqrtf(t.squares.x * inverse_k + a.eps),
                         rsqrtf(t.squares.y * inverse_k + a.eps)};
#pragma unroll
    for (float2& x : t.sum) x.x *= rstd.x, x.y *= rstd.y;
  }
  if constexpr (kSwiGlu) {
    StorePanel(p, j, h, blockIdx.y * kPanelRows, Silu(t.sum[0].x) * t.sum[1].x,
               Silu(t.sum[0].y) * t.sum[1].y);
  } else {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel)
      StorePanel(p, j, h, (blockIdx.y * kPanels + panel) * kPanelRows, t.sum[panel].x,
                 t.sum[panel].y);
  }
}

// Adds this block's share of the tile over the cluster and stores it.
template <bool kSwiGlu, int kTokens, int kPanels>
__device__ void ReduceAndStore(const SkinnyParameters& p, SkinnyShared<kTokens, kPanels>& s,
                               const float (&sum)[kPanels][kTokens / 2]) {
  constexpr int kPairs = kTokens / 4;
  const int rank = ClusterRank(), ranks = ClusterSize();
  NamedSync(1, kMultipliers);  // the weights, whose place the sums take, have been read
#pragma unroll
  for (int panel = 0; panel < kPanels; ++panel) {
#pragma unroll
    for (int q = 0; q < kPairs; ++q)
      s.sums[panel][q / 2][q % 2][threadIdx.x] = {sum[panel][2 * q], sum[panel][2 * q + 1]};
  }
  ClusterSync();
  const int end = kPairs * (rank + 1) / ranks;
  for (int q = kPairs * rank / ranks; q < end; ++q) {
    PairSums<kTokens, kPanels> t;
#pragma unroll 4
    for (int from = 0; from < ranks; ++from) t.Add(s, from, q / 2, q % 2);
    StorePairs<kSwiGlu>(p, q / 2, q % 2, t);
  }
  ClusterSync();  // shared memory lives until the others have read it
}

template <typename X, bool kSwiGlu, int kTokens, int kPanels>
__global__ void __launch_bounds__(SkinnyShape<kTokens, kPanels>::kThreads,
                                  SkinnyShape<kTokens, kPanels>::kResident)
    SkinnyMatMulKernel(const __grid_constant__ SkinnyParameters p) {
  using Shape = SkinnyShape<kTokens, kPanels>;
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<SkinnyShared<kTokens, kPanels>*>(raw);
  LetSuccessorStart();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shape::kStages; ++i) s.w_full[i].Init(1), s.w_empty[i].Init(4);
    for (int i = 0; i < Shape::kXStages; ++i)
      s.x_full[i].Init(Shape::kLoaders / 32), s.x_empty[i].Init(4);
    FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x >= kMultipliers + Shape::kLoaders) {
    if (threadIdx.x == kMultipliers + Shape::kLoaders) LoadWeights(p, s);
    return;
  }
  WaitForPredecessor();
  if (threadIdx.x >= kMultipliers) {
    LoadTokens<X>(p, s);
    return;
  }
  float sum[kPanels][kTokens / 2];
  MultiplyColumns(p, s, sum);
  ReduceAndStore<kSwiGlu>(p, s, sum);
}

// Blocks of a cluster: enough that the device's memory is kept busy, as few as possible.
int ClusterBlocks(int tiles, int k_blocks) {
  constexpr int kWantedBlocks = 256, kMaxBlocks = 8;
  const int wanted = (kWantedBlocks + tiles - 1) / tiles;
  const int most = k_blocks < kMaxBlocks ? k_blocks : kMaxBlocks;
  return wanted < most ? wanted : most;
}

template <typename X, bool kSwiGlu, int kTokens, int kPanels>
cudaError_t Launch(const SkinnyArgs& a, cudaStream_t stream) {
  using Shape = SkinnyShape<kTokens, kPanels>;
  SkinnyParameters p = {};
  p.args = a;
  p.out_columns = static_cast<int>(kSwiGlu ? a.n / 2 : a.n);
  p.tile_stride = kSwiGlu ? kPanelRows : kPanels * kPanelRows;
  p.panel_stride = kSwiGlu ? p.out_columns : kPanelRows;
  p.k_blocks = static_cast<int>((a.k + kColumns - 1) / kColumns);
  const MapShape shape = {a.w, a.n, a.w_stride, 1, static_cast<int32_t>(a.k)};
  if (const cudaError_t e = MakeMap(p.w, shape, kPanelRows)) return e;
  const int tiles = (p.out_columns + p.tile_stride - 1) / p.tile_stride;
  const int blocks = ClusterBlocks(tiles, p.k_blocks);
  const OverlappedGrid grid = {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles)),
                               Shape::kThreads, sizeof(SkinnyShared<kTokens, kPanels>), blocks};
  return LaunchOverlapped<SkinnyMatMulKernel<X, kSwiGlu, kTokens, kPanels>>(grid, stream, p);
}

template <typename X, bool kSwiGlu>
cudaError_t Dispatch(const SkinnyArgs& a, cudaStream_t stream) {
  constexpr int kPanels = kSwiGlu ? 2 : 1;
  if (a.rows <= 8) return Launch<X, kSwiGlu, 8, kPanels>(a, stream);
  return Launch<X, kSwiGlu, 16, kPanels>(a, stream);
}
template <typename X>
cudaError_t Dispatch(const SkinnyArgs& a, cudaStream_t stream) {
  return a.swiglu ? Dispatch<X, true>(a, stream) : Dispatch<X, false>(a, stream);
}

}  // namespace

cudaError_t LaunchSkinnyMatMul(const SkinnyArgs& args, cudaStream_t stream) {
  return args.x_is_f32 ? Dispatch<float>(args, stream) : Dispatch<Bf16>(args, stream);
}

}  // namespace coppice::cuda
