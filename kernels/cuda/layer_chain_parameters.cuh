// The parameters of the layer chain's kernels, on the host.
#pragma once

#include "kernels/cuda/layer_chain.cuh"

namespace coppice::cuda {

constexpr int64_t kCounterBytes = 256;
constexpr int64_t PieceBytes(int64_t blocks) { return 2 * blocks * kMaxChainRows * 512; }

// 128 weight rows by 64 columns: neighbours, or where the product is [gate | up] 64 of each, 8 rows
// of gate before the same 8 of up, so that a thread has both sums of a column.
inline cudaError_t MakeWeightMap(CUtensorMap& map, const ChainMatrix& w, int64_t n, int64_t k,
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
inline cudaError_t MakePhase(ChainPhase& phase, const ChainProduct& product, int64_t rows,
                             int tokens, int blocks, int& rotation) {
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

// For `tokens` rows of x at most.
inline cudaError_t MakeChainParameters(ChainParameters& p, const LayerChainArgs& a,
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
    if (const cudaError_t e = MakePhase(p.phases[i], products[i], a.rows, tokens, blocks, rotation))
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

}  // namespace coppice::cuda
