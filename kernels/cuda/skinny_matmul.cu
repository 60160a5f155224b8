// Few rows times weights on wgmma + TMA, transposed: c^T = W x^T, weights as the 64-row operand,
// tokens as 8 to 64 columns.
//
// With a norm, RmsNorm(x) W^T = rstd * (x * norm) W^T: x * norm is rounded to 16 bits on its way
// into shared memory, the sum of squares is gathered beside it, and rstd multiplies the result.
//
// A cluster of 1 to 8 blocks takes a tile of 64 or 128 weight rows, each block an equal share of
// its columns. Then every block sends what it summed to those that add it up, in the order of
// ranks, and store it. Warps: four multiply and store (and norm x), one issues the copies of x,
// one those of the weights. Those do not wait for the kernel before, so memory stays busy between
// kernels. Traffic: 2 n k bytes; bound by memory.
#include "kernels/cuda/skinny_tokens.cuh"

namespace coppice::cuda {
namespace {

// The next kernel starts when this many of a block's weight copies are still to be issued: sooner,
// its copies would come before them; later, memory would idle while the last sums are added.
constexpr int kCopiesBehind = 3;

template <typename Shape>
__device__ void LoadWeights(const SkinnyParameters& p, SkinnyShared<Shape>& s) {
  Ring<Shape::kStages> ring;
  const ColumnBlocks blocks(p);
  if (!p.args.w_is_parameter) WaitForPredecessor();
  for (int b = blocks.begin; b < blocks.end; ++b, ring.Advance()) {
    s.w_empty[ring.stage].Wait(ring.phase ^ 1);
    s.w_full[ring.stage].ArriveExpecting(Shape::kStageBytes);
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel)
      LoadBox(s.w[ring.stage] + panel * kPanelRows * kColumns * 2, p.w, b * kColumns, 0,
              blockIdx.y * kPanelRows + panel * p.panel_stride, s.w_full[ring.stage]);
    if (b + 1 + kCopiesBehind >= blocks.end) LetSuccessorStart();
  }
}

// Adds one column block. Element 4j + 2h + e of a panel's sums is weight row
// 16 warp + lane / 4 + 8 h, token 8j + 2 (lane % 4) + e.
template <typename Shape, typename WRing>
__device__ __forceinline__ void MultiplyBlock(SkinnyShared<Shape>& s, WRing& ring,
                                              const unsigned char* x_stage,
                                              float (&sum)[Shape::kPanels][Shape::kTokens / 2]) {
  s.w_full[ring.stage].Wait(ring.phase);
  const unsigned char* w_stage = s.w[ring.stage];
  const uint64_t x = ColumnsAreK(x_stage);
  WgmmaFence();
#pragma unroll
  for (int panel = 0; panel < Shape::kPanels; ++panel) {
    const uint64_t w = ColumnsAreK(w_stage + panel * kPanelRows * kColumns * 2);
#pragma unroll
    for (int k = 0; k < kColumns; k += 16)
      WgmmaStep<typename Shape::Element>(sum[panel], Advanced(w, k * 2), Advanced(x, k * 2), true);
  }
  WgmmaCommit();
  WgmmaWait<0>();
  if (threadIdx.x % 32 == 0) s.w_empty[ring.stage].Arrive();
  ring.Advance();
}

// Sums of this block's columns.
template <typename Shape>
__device__ __forceinline__ void MultiplyColumns(const SkinnyParameters& p, SkinnyShared<Shape>& s,
                                                float (&sum)[Shape::kPanels][Shape::kTokens / 2]) {
  Ring<Shape::kStages> w_ring;
  Ring<Shape::kXStages> x_ring;
  const ColumnBlocks blocks(p);
  for (int b = blocks.begin; b < blocks.end; ++b, x_ring.Advance()) {
    s.x_full[x_ring.stage].Wait(x_ring.phase);
    MultiplyBlock(s, w_ring, s.x[x_ring.stage], sum);
    if (threadIdx.x % 32 == 0) s.x_empty[x_ring.stage].Arrive();
  }
  Pin(sum);
}
// The same for x * norm.
template <typename Shape>
__device__ __forceinline__ void MultiplyNormedColumns(
    const SkinnyParameters& p, SkinnyShared<Shape>& s,
    float (&sum)[Shape::kPanels][Shape::kTokens / 2]) {
  Ring<Shape::kStages> w_ring;
  const ColumnBlocks blocks(p);
  float squares = 0.f;
  for (int b = blocks.begin; b < blocks.end; ++b) {
    const int stage = (b - blocks.begin) % Shape::kXStages;
    if (stage == 0) {
      NamedSync(1, kMultipliers);  // the stages have been read
      BringNormedTokens(p.args, s, b, blocks.end, squares);
      NamedSync(1, kMultipliers);
    }
    MultiplyBlock(s, w_ring, s.x[stage], sum);
  }
  Pin(sum);
  ClusterWait();
  SendSquares(s, squares);
}

// Every unit of this block's sums to the rank that adds it up.
template <typename Shape>
__device__ __forceinline__ void SendSums(SkinnyShared<Shape>& s,
                                         const float (&sum)[Shape::kPanels][Shape::kTokens / 2]) {
  using U = Units<Shape::kTokens>;
  const int rank = ClusterRank(), ranks = ClusterSize();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < Shape::kTokens / 8; ++j) {
    const int unit = 4 * j + warp, owner = U::Owner(unit, ranks);
    const int place = (unit - U::Begin(owner, ranks)) * ranks + rank;
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      const float* x = sum[panel] + 4 * j;
      Send(owner, s.sums() + (place * Shape::kPanels + panel) * 32 + lane,
           float4{x[0], x[1], x[2], x[3]}, s.sums_full);
    }
  }
  if (ranks == 1) NamedSync(1, kMultipliers);
}

template <typename E>
__device__ __forceinline__ float2 LoadPair(const void* from, int64_t at, bool is_f32) {
  if (is_f32) return __ldcg(reinterpret_cast<const float2*>(static_cast<const float*>(from) + at));
  return Pair<E>(__ldcg(reinterpret_cast<const uint32_t*>(static_cast<const E*>(from) + at)));
}

// One token's `column` and the next of c.
template <typename E>
struct Target {
  int token, column;
  bool inside;

  // Of a unit's half h. Lanes 4 apart hold neighbouring columns: each takes both of one token.
  __device__ Target(const SkinnyParameters& p, int unit, int h) {
    const int lane = threadIdx.x % 32;
    token = unit / 4 * 8 + lane % 4 * 2 + lane / 4 % 2;
    column = blockIdx.y * kPanelRows + unit % 4 * 16 + lane / 8 * 2 + 8 * h;
    inside = token < p.args.rows && column < p.out_columns;
  }
  // What is added to the product.
  __device__ __forceinline__ float2 Base(const SkinnyArgs& a) const {
    float2 base = {0.f, 0.f};
    if (inside && a.bias != nullptr) base = LoadPair<E>(a.bias, column, false);
    if (inside && a.addend != nullptr) {
      const float2 x = LoadPair<E>(a.addend, token * a.addend_stride + column, a.c_is_f32);
      base.x += x.x, base.y += x.y;
    }
    return base;
  }
  __device__ __forceinline__ void Store(const SkinnyArgs& a, float2 y) const {
    if (!inside) return;
    const int64_t at = token * a.c_stride + column;
    if (a.c_is_f32) {
      *reinterpret_cast<float2*>(static_cast<float*>(a.c) + at) = y;
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<E*>(a.c) + at) = PackPair<E>(y.x, y.y);
    }
  }
};

// Of this lane's (even token, odd token) and that of the lane 4 away, both of one token.
__device__ __forceinline__ float2 Exchange(float even_token, float odd_token) {
  const bool odd = threadIdx.x / 4 % 2;
  const float other = __shfl_xor_sync(~0u, odd ? even_token : odd_token, 4);
  return odd ? float2{other, odd_token} : float2{even_token, other};
}

__device__ __forceinline__ float Silu(float x) { return x / (1.f + __expf(-x)); }

// Factors of the two tokens whose sums this lane holds.
template <typename Shape>
__device__ __forceinline__ float2 Rstd(const SkinnyArgs& a, const SkinnyShared<Shape>& s, int j) {
  float2 squares = {0.f, 0.f};
  for (int from = 0; from < ClusterSize(); ++from) {
#pragma unroll
    for (int i = 8 * j; i < kSquareLanes; i += Shape::kTokens) {
      const int lane = i + threadIdx.x % 4 * 2;
      squares.x += s.squares[from][lane], squares.y += s.squares[from][lane + 1];
    }
  }
  const float inverse_k = 1.f / static_cast<float>(a.k);
  constexpr float kBack = 1.f / kNormedUnit<typename Shape::Element>;
  return {rsqrtf(squares.x * inverse_k + a.eps) * kBack,
          rsqrtf(squares.y * inverse_k + a.eps) * kBack};
}

// A unit's sums over the ranks.
template <typename Shape>
__device__ __forceinline__ void AddRanks(const SkinnyArgs& a, SkinnyShared<Shape>& s, int unit,
                                         int place, float4 (&sum)[Shape::kPanels]) {
  const int lane = threadIdx.x % 32, ranks = ClusterSize();
#pragma unroll
  for (float4& x : sum) x = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
  for (int from = 0; from < ranks; ++from) {
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      const float4 x = s.sums()[((place * ranks + from) * Shape::kPanels + panel) * 32 + lane];
      sum[panel].x += x.x, sum[panel].y += x.y, sum[panel].z += x.z, sum[panel].w += x.w;
    }
  }
  if constexpr (Shape::kNormed) {
    const float2 rstd = Rstd(a, s, unit / 4);
#pragma unroll
    for (float4& x : sum) x.x *= rstd.x, x.y *= rstd.y, x.z *= rstd.x, x.w *= rstd.y;
  }
}

// What is added to a unit's columns of c.
template <typename Shape>
struct Base {
  float2 x[2];

  __device__ __forceinline__ void Read(const SkinnyParameters& p, int unit) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x[h] = {0.f, 0.f};
      if (!Shape::kSwiGlu && unit < Units<Shape::kTokens>::kCount)
        x[h] = Target<typename Shape::Element>(p, unit, h).Base(p.args);
    }
  }
};

template <typename Shape>
__device__ __forceinline__ void StoreUnit(const SkinnyParameters& p, SkinnyShared<Shape>& s,
                                          int unit, int place, const Base<Shape>& base) {
  float4 sum[Shape::kPanels];
  AddRanks(p.args, s, unit, place, sum);
  float4& x = sum[0];
  if constexpr (Shape::kSwiGlu) {
    const float4& up = sum[1];
    x = {Silu(x.x) * up.x, Silu(x.y) * up.y, Silu(x.z) * up.z, Silu(x.w) * up.w};
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 y = h == 0 ? Exchange(x.x, x.y) : Exchange(x.z, x.w);
    Target<typename Shape::Element>(p, unit, h)
        .Store(p.args, {y.x + base.x[h].x, y.y + base.x[h].y});
  }
}

// A warp's units of those that its block adds up: every fourth.
template <typename Shape>
struct OwnUnits {
  int begin, end, first;
  __device__ OwnUnits()
      : begin(Units<Shape::kTokens>::Begin(ClusterRank(), ClusterSize())),
        end(Units<Shape::kTokens>::Begin(ClusterRank() + 1, ClusterSize())),
        first(begin + threadIdx.x / 32) {}
};

// Adds up this warp's units and stores them; `base`, of the first of them, was read before the sums
// were there.
template <typename Shape>
__device__ void StoreSums(const SkinnyParameters& p, SkinnyShared<Shape>& s,
                          const Base<Shape> (&base)[Shape::kEarlyUnits]) {
  constexpr int kWarps = kMultipliers / 32;
  const OwnUnits<Shape> own;
  s.sums_full.Wait(0);  // also for those without units: shared memory lives until all has come
#pragma unroll
  for (int i = 0; i < Shape::kEarlyUnits; ++i) {
    const int unit = own.first + kWarps * i;
    if (unit < own.end) StoreUnit(p, s, unit, unit - own.begin, base[i]);
  }
  for (int unit = own.first + kWarps * Shape::kEarlyUnits; unit < own.end; unit += kWarps) {
    Base<Shape> late;
    late.Read(p, unit);
    StoreUnit(p, s, unit, unit - own.begin, late);
  }
}

template <typename Shape>
__device__ void InitBarriers(SkinnyShared<Shape>& s) {
  using U = Units<Shape::kTokens>;
  for (int i = 0; i < Shape::kStages; ++i) s.w_full[i].Init(1), s.w_empty[i].Init(4);
  for (int i = 0; i < Shape::kXStages; ++i) s.x_full[i].Init(1), s.x_empty[i].Init(4);
  s.sums_full.Init(1);
  FenceBarrierInit();
  const int rank = ClusterRank(), ranks = ClusterSize();
  const int units = U::Begin(rank + 1, ranks) - U::Begin(rank, ranks);
  const int squares = Shape::kNormed ? kSquareLanes * 4 : 0;
  const int bytes = ranks * (units * Shape::kPanels * 512 + squares);
  s.sums_full.ArriveExpecting(ranks == 1 ? 0 : bytes);
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
    SkinnyMatMulKernel(const __grid_constant__ SkinnyParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<SkinnyShared<Shape>*>(raw);
  if (threadIdx.x == 0) InitBarriers(s);
  __syncthreads();
  ClusterArrive();  // what others send may come
  if (threadIdx.x / 32 == kMultipliers / 32) {
    if (threadIdx.x % 32 == 0) LoadWeights(p, s);
    return;
  }
  WaitForPredecessor();
  if (threadIdx.x >= kMultipliers) {
    if constexpr (!Shape::kNormed) {
      if (threadIdx.x % 32 == 0) LoadTokenBoxes(p, s);
    }
    return;
  }
  Base<Shape> base[Shape::kEarlyUnits];
#pragma unroll
  for (int i = 0; i < Shape::kEarlyUnits; ++i)
    base[i].Read(p, OwnUnits<Shape>().first + kMultipliers / 32 * i);
  float sum[Shape::kPanels][Shape::kTokens / 2] = {};
  if constexpr (Shape::kNormed) {
    MultiplyNormedColumns(p, s, sum);
  } else {
    MultiplyColumns(p, s, sum);
    ClusterWait();
  }
  if constexpr (!Shape::kOwnSums) {  // until all have read what the sums replace
    ClusterArrive();
    ClusterWait();
  }
  SendSums(s, sum);
  StoreSums(p, s, base);
}

// Blocks of a cluster: enough that the device's memory is kept busy, as few as possible.
int ClusterBlocks(int tiles, int k_blocks) {
  constexpr int kWantedBlocks = 256;
  const int wanted = (kWantedBlocks + tiles - 1) / tiles;
  const int most = k_blocks < kMaxRanks ? k_blocks : kMaxRanks;
  return wanted < most ? wanted : most;
}

template <typename Shape>
cudaError_t Launch(const SkinnyArgs& a, cudaStream_t stream) {
  static_assert(Shape::kResident * (sizeof(SkinnyShared<Shape>) + 1024) <= 227 << 10);
  SkinnyParameters p = {};
  p.args = a;
  p.out_columns = static_cast<int>(Shape::kSwiGlu ? a.n / 2 : a.n);
  p.panel_stride = Shape::kSwiGlu ? p.out_columns : kPanelRows;
  p.k_blocks = static_cast<int>((a.k + kColumns - 1) / kColumns);
  const MapShape w = {a.w, a.n, a.w_stride, 1, static_cast<int32_t>(a.k)};
  if (const cudaError_t e = MakeMap(p.w, w, kPanelRows)) return e;
  if constexpr (!Shape::kNormed) {
    const MapShape x = {a.x, a.rows, a.x_stride, 1, static_cast<int32_t>(a.k)};
    if (const cudaError_t e = MakeMap(p.x, x, Shape::kTokens)) return e;
  }
  const int tiles = (p.out_columns + kPanelRows - 1) / kPanelRows;
  const int blocks = ClusterBlocks(tiles, p.k_blocks);
  const OverlappedGrid grid = {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tiles)),
                               Shape::kThreads, sizeof(SkinnyShared<Shape>), blocks};
  return LaunchOverlapped<SkinnyMatMulKernel<Shape>>(grid, stream, p);
}

template <typename E, bool kSwiGlu>
cudaError_t Dispatch(const SkinnyArgs& a, cudaStream_t stream) {
  if (a.norm != nullptr) return Launch<SkinnyShape<E, true, kSwiGlu, 8>>(a, stream);
  if (a.rows <= 8) return Launch<SkinnyShape<E, false, kSwiGlu, 8>>(a, stream);
  if (a.rows <= 16) return Launch<SkinnyShape<E, false, kSwiGlu, 16>>(a, stream);
  if (a.rows <= 32) return Launch<SkinnyShape<E, false, kSwiGlu, 32>>(a, stream);
  return Launch<SkinnyShape<E, false, kSwiGlu, 64>>(a, stream);
}

}  // namespace

cudaError_t LaunchSkinnyMatMul(const SkinnyArgs& args, cudaStream_t stream) {
  return ForElement(args.dtype, [&]<typename E>(E) {
    return args.swiglu ? Dispatch<E, true>(args, stream) : Dispatch<E, false>(args, stream);
  });
}

}  // namespace coppice::cuda
