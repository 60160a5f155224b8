// SwiGLU as the epilogue of its products (cluster_matmul.cuh has the product).
//
// Forward: a tile's 256 columns are 128 gates and their 128 ups, one share a block, so that a
// thread holds both of an element. Backward: a tile is 256 columns of d_act; gate and up of 64
// columns are read while the tensor cores finish, or while the 64 before are folded. A warp turns
// its 16 rows x 64 columns between the accumulators' layout and rows of memory in two buffers of
// its own, which the copy engine empties: no barrier but the warp's. Bytes of memory per element of
// act: 2 forward, 6 with gate and up kept; 10 backward. Bound by tensor cores at the power limit.
#include "kernels/cuda/cluster_matmul.cuh"
#include "kernels/cuda/gated_matmul.h"
#include "kernels/cuda/swiglu.cuh"

namespace coppice::cuda {
namespace {

constexpr int kWarpRows = 16;
constexpr int kBuffers = 2;               // of a warp
constexpr int kGates = kTileColumns / 2;  // of a forward tile

struct GatedShared : TileShared {
  alignas(1024) uint16_t staged[kConsumerWarps][kBuffers][kWarpRows * kPanel];
};

struct GatedParameters {
  TileWork work;
  RightColumns right;
  CUtensorMap gate, up, act;
  GatedMatMulArgs args;
};
struct GatedBackwardParameters {
  TileWork work;
  RightRows right;
  CUtensorMap d_gate, d_up, act;
  GatedBackwardArgs args;
};

// 16 rows x 64 columns of a [rows, columns] matrix from `row` and `column` on, zeros where it has
// none: a lane reads 8 columns of every fourth row.
__device__ __forceinline__ void ReadPanel(const uint16_t* data, int64_t stride, int row, int column,
                                          int64_t rows, int64_t columns, uint4 (&x)[4]) {
  asm volatile("" : "+r"(row));  // addresses kept from panel to panel would spill
  const int lane = threadIdx.x % 32;
  const int first = row + lane / 8, at = column + lane % 8 * 8;
  const uint16_t* from = data + first * stride + at;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool inside = at < columns && first + 4 * i < rows;
    x[i] = inside ? *reinterpret_cast<const uint4*>(from + 4 * i * stride) : uint4{};
  }
}

// A warp's buffers of shared memory, each a swizzled panel of 16 rows x 64 columns, in turn.
class WarpBuffers {
 public:
  __device__ __forceinline__ explicit WarpBuffers(const uint16_t* first) {
    const int lane = threadIdx.x % 32;
    base_ = SharedAddress(first);
    tile_ = lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
    rows_ = lane / 8 * 128 + ((lane % 8 ^ lane / 8) << 4);
  }
  // The next buffer, once the copy engine has read what it held. kHeld: those taken and not sent.
  template <int kHeld>
  __device__ __forceinline__ uint32_t Take() {
    if (threadIdx.x % 32 == 0)
      asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kBuffers - 1 - kHeld) : "memory");
    __syncwarp();
    const uint32_t at = base_ + next_ * kBytes;
    if (++next_ == kBuffers) next_ = 0;
    return at;
  }
  // Columns [16 i, 16 i + 16) in the accumulators' layout.
  __device__ __forceinline__ void StoreTile(uint32_t at, int i, const uint32_t* x) const {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     at + (tile_ ^ i << 5)),
                 "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  }
  __device__ __forceinline__ void LoadTile(uint32_t at, int i, uint32_t (&x)[4]) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(at + (tile_ ^ i << 5))
                 : "memory");
  }
  // In ReadPanel's layout.
  __device__ __forceinline__ void StoreRows(uint32_t at, const uint4 (&x)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      asm volatile(
          "st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at + (rows_ ^ i % 2 << 6) + i * 512),
          "r"(x[i].x), "r"(x[i].y), "r"(x[i].z), "r"(x[i].w)
          : "memory");
  }
  // Queues a buffer's copy to a matrix; what is outside is dropped.
  __device__ __forceinline__ void Send(uint32_t at, const CUtensorMap& map, int column,
                                       int row) const {
    FenceAsyncShared();
    __syncwarp();
    if (threadIdx.x % 32 != 0) return;
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
            &map),
        "r"(column), "r"(0), "r"(row), "r"(at)
        : "memory");
    CommitStores();
  }
  // Shared memory lives until the copy engine has read it.
  __device__ __forceinline__ void Drain() const {
    if (threadIdx.x % 32 == 0) WaitStoresRead();
  }

 private:
  static constexpr int kBytes = kWarpRows * kPanel * 2;
  uint32_t base_, tile_, rows_;
  int next_ = 0;
};

// Folds gates and ups [64 kHalf, 64 kHalf + 64) of a tile.
template <typename E, int kHalf>
__device__ __forceinline__ void FoldGates(const GatedParameters& p, int row, int column,
                                          WarpBuffers& buffers, const float (&acc)[128]) {
  uint32_t gate[16], up[16];
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const int at = 32 * kHalf + 2 * j;
    gate[j] = PackPair<E>(acc[at], acc[at + 1]);
    up[j] = PackPair<E>(acc[64 + at], acc[64 + at + 1]);
  }
  const auto send = [&](const uint32_t(&x)[16], const CUtensorMap& map) {
    const uint32_t at = buffers.Take<0>();
#pragma unroll
    for (int i = 0; i < 4; ++i) buffers.StoreTile(at, i, x + 4 * i);
    buffers.Send(at, map, column, row);
  };
  if (p.args.gate_up != nullptr) {
    send(gate, p.gate);
    send(up, p.up);
  }
  if (p.args.act == nullptr) return;
  uint32_t act[16];
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    const float2 g = Pair<E>(gate[j]), u = Pair<E>(up[j]);
    act[j] = PackPair<E>(GatedUnit(g.x, u.x), GatedUnit(g.y, u.y));
  }
  send(act, p.act);
}

template <typename E>
__global__ void __launch_bounds__(kTileThreads, 1)
    GatedMatMulKernel(const __grid_constant__ GatedParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<GatedShared*>(raw);
  RunTiles(p.work, p.right, s, [&](int group) {
    const int warp = threadIdx.x / 32 % 4;
    WarpBuffers buffers(s.staged[group * 4 + warp][0]);
    ConsumeTiles<E, RightColumns>(p.work, s, group, [&](const Item& item, const auto& multiply) {
      float acc[128];
      multiply(acc, [] {});
      const int row = item.row + group * 64 + warp * kWarpRows, column = item.tile * kGates;
      FoldGates<E, 0>(p, row, column, buffers, acc);
      FoldGates<E, 1>(p, row, column + kPanel, buffers, acc);
    });
    buffers.Drain();
  });
}

struct GatePanel {
  uint4 gate[4], up[4];

  __device__ __forceinline__ void Read(const GatedBackwardArgs& a, int row, int column) {
    const auto* gates = static_cast<const uint16_t*>(a.gate_up);
    ReadPanel(gates, a.gate_up_stride, row, column, a.rows, a.ffn, gate);
    ReadPanel(gates + a.ffn, a.gate_up_stride, row, column, a.rows, a.ffn, up);
  }
};

// Folds columns [64 kQuarter, 64 kQuarter + 64) of a tile, whose gates and ups `panel` has, and
// reads those of the next.
template <typename E, int kQuarter>
__device__ __forceinline__ void FoldGradient(const GatedBackwardParameters& p, int row, int column,
                                             WarpBuffers& buffers, GatePanel& panel,
                                             const float (&acc)[128]) {
  const uint32_t gates = buffers.Take<0>(), ups = buffers.Take<1>();
  buffers.StoreRows(gates, panel.gate);
  buffers.StoreRows(ups, panel.up);
  __syncwarp();
  if constexpr (kQuarter < 3) panel.Read(p.args, row, column + kPanel);
  uint32_t act[16];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t gate[4], up[4];
    buffers.LoadTile(gates, i, gate);
    buffers.LoadTile(ups, i, up);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = 32 * kQuarter + 8 * i + 2 * j;
      const GatedGradient x = GatedUnitBackward(Pair<E>(gate[j]).x, Pair<E>(up[j]).x, acc[at]);
      const GatedGradient y = GatedUnitBackward(Pair<E>(gate[j]).y, Pair<E>(up[j]).y, acc[at + 1]);
      gate[j] = PackPair<E>(x.gate, y.gate);
      up[j] = PackPair<E>(x.up, y.up);
      act[4 * i + j] = PackPair<E>(x.act, y.act);
    }
    buffers.StoreTile(gates, i, gate);
    buffers.StoreTile(ups, i, up);
  }
  buffers.Send(gates, p.d_gate, column, row);
  buffers.Send(ups, p.d_up, column, row);
  const uint32_t acts = buffers.Take<0>();
#pragma unroll
  for (int i = 0; i < 4; ++i) buffers.StoreTile(acts, i, act + 4 * i);
  buffers.Send(acts, p.act, column, row);
}

template <typename E>
__global__ void __launch_bounds__(kTileThreads, 1)
    GatedBackwardKernel(const __grid_constant__ GatedBackwardParameters p) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& s = *reinterpret_cast<GatedShared*>(raw);
  RunTiles(p.work, p.right, s, [&](int group) {
    const int warp = threadIdx.x / 32 % 4;
    WarpBuffers buffers(s.staged[group * 4 + warp][0]);
    ConsumeTiles<E, RightRows>(p.work, s, group, [&](const Item& item, const auto& multiply) {
      const int row = item.row + group * 64 + warp * kWarpRows, column = item.tile * kTileColumns;
      float acc[128];
      GatePanel panel;
      multiply(acc, [&] { panel.Read(p.args, row, column); });
      FoldGradient<E, 0>(p, row, column, buffers, panel, acc);
      FoldGradient<E, 1>(p, row, column + kPanel, buffers, panel, acc);
      FoldGradient<E, 2>(p, row, column + 2 * kPanel, buffers, panel, acc);
      FoldGradient<E, 3>(p, row, column + 3 * kPanel, buffers, panel, acc);
    });
    buffers.Drain();
  });
}

// [rows, ffn], written a warp's panel at a time.
cudaError_t MakeOutMap(CUtensorMap& map, const void* data, int64_t stride, int64_t rows,
                       int64_t ffn) {
  return MakeMap(map, {data, rows, stride, 1, static_cast<int32_t>(ffn)}, kWarpRows);
}
// The two halves of [rows, 2 ffn].
cudaError_t MakeOutMaps(CUtensorMap& gate, CUtensorMap& up, const void* data, int64_t stride,
                        int64_t rows, int64_t ffn) {
  if (auto e = MakeOutMap(gate, data, stride, rows, ffn)) return e;
  return MakeOutMap(up, static_cast<const uint16_t*>(data) + ffn, stride, rows, ffn);
}

}  // namespace

cudaError_t LaunchGatedMatMul(const GatedMatMulArgs& a, cudaStream_t stream) {
  GatedParameters p = {};
  const int64_t tiles = (a.ffn + kGates - 1) / kGates;
  if (auto e = MakeTileWork(p.work, a.x, a.x_stride, a.rows, a.k, tiles, a.counter)) return e;
  const auto k = static_cast<int32_t>(a.k);
  if (auto e = MakeMap(p.right.map, {a.weight, 2 * a.ffn, a.weight_stride, 1, k}, kShare)) return e;
  p.right.tile_stride = kGates;
  p.right.share_stride = static_cast<int>(a.ffn);
  if (a.gate_up != nullptr)
    if (auto e = MakeOutMaps(p.gate, p.up, a.gate_up, a.gate_up_stride, a.rows, a.ffn)) return e;
  if (a.act != nullptr)
    if (auto e = MakeOutMap(p.act, a.act, a.act_stride, a.rows, a.ffn)) return e;
  p.args = a;
  return ForElement(a.dtype, [&](auto e) {
    return LaunchTiles(GatedMatMulKernel<decltype(e)>, p, p.work, sizeof(GatedShared), stream);
  });
}

cudaError_t LaunchGatedBackward(const GatedBackwardArgs& a, cudaStream_t stream) {
  GatedBackwardParameters p = {};
  const int64_t tiles = (a.ffn + kTileColumns - 1) / kTileColumns;
  if (auto e = MakeTileWork(p.work, a.d_y, a.d_y_stride, a.rows, a.k, tiles, a.counter)) return e;
  const auto ffn = static_cast<int32_t>(a.ffn);
  if (auto e = MakeMap(p.right.map, {a.weight, a.k, a.weight_stride, 1, ffn}, kPanel)) return e;
  if (auto e = MakeOutMaps(p.d_gate, p.d_up, a.d_gate_up, a.d_gate_up_stride, a.rows, a.ffn))
    return e;
  if (auto e = MakeOutMap(p.act, a.act, a.act_stride, a.rows, a.ffn)) return e;
  p.args = a;
  return ForElement(a.dtype, [&](auto e) {
    return LaunchTiles(GatedBackwardKernel<decltype(e)>, p, p.work, sizeof(GatedShared), stream);
  });
}

}  // namespace coppice::cuda
