// What the warps of a block do for the phases of the layer chain: copy weights, copy x, norm,
// multiply. layer_chain.cu says how they work together.
#pragma once

#include "kernels/cuda/layer_chain_sums.cuh"

namespace coppice::cuda {

// A unit of weights, which no other block reads.
__device__ __forceinline__ void LoadUnit(void* to, const ChainPhase& phase, int column, int tile,
                                         Barrier& full, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(SharedAddress(to)),
      "l"(&phase.w), "r"(column), "r"(tile * phase.tile_rows), "r"(0),
      "r"(tile * phase.tile_groups), "r"(tile * phase.tile_heads), "r"(SharedAddress(&full.word)),
      "l"(policy)
      : "memory");
}

// Whether a barrier's first phase is over.
__device__ __forceinline__ bool IsOver(const Barrier& barrier) {
  uint32_t over;
  asm volatile(
      "{\n.reg .pred over;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 over, [%1], 0;\n"
      "selp.u32 %0, 1, 0, over;\n}"
      : "=r"(over)
      : "r"(SharedAddress(&barrier.word))
      : "memory");
  return over != 0;
}

// By one thread: units of weights of all phases, kInFlight of them on their way at a time, of a
// phase whose x is not there yet kInFlightAhead.
template <typename Shape>
struct WeightLoader {
  const ChainParameters& p;
  ChainShared<Shape>& s;
  Ring<Shape::kStages> ring, landed;
  int in_flight = 0;

  __device__ __forceinline__ void Load() {
    const uint64_t policy = EvictFirst();
    for (int i = 0; i < p.num_phases; ++i) {
      const ChainPhase& phase = p.phases[i];
      const Run run(phase);
      int tile = run.begin / phase.k_blocks, block = run.begin % phase.k_blocks;
      for (int unit = run.begin; unit < run.end; ++unit) {
        const int stage =
            TakeStage(i == 0 || IsOver(s.started[i]) ? Shape::kInFlight : Shape::kInFlightAhead);
        s.w_full[stage].ArriveExpecting(kUnitBytes);
        LoadUnit(s.w[stage], phase, block * kColumns, tile, s.w_full[stage], policy);
        if (++block == phase.k_blocks) block = 0, ++tile;
      }
    }
  }

 private:
  // The next stage, once it is free and less than `limit` units are on their way.
  __device__ __forceinline__ int TakeStage(int limit) {
    for (; in_flight >= limit; --in_flight) {
      s.w_full[landed.stage].Wait(landed.phase);
      landed.Advance();
    }
    ++in_flight;
    s.w_empty[ring.stage].Wait(ring.phase ^ 1);
    const int stage = ring.stage;
    ring.Advance();
    return stage;
  }
};

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
    const Run run(phase);
    int block = run.begin % phase.k_blocks;
    if (i > 0) {
      WaitForGrid(p, i - 1);
      s.started[i].Arrive();
      if (phase.step != ChainStep::kResidual) s.squares_there.Arrive();
    }
    for (int unit = run.begin; unit < run.end; ++unit, ring.Advance()) {
      s.x_empty[ring.stage].Wait(ring.phase ^ 1);
      s.x_full[ring.stage].ArriveExpecting(Shape::kXStageBytes);
      LoadBox(s.x[ring.stage], phase.x, block * kColumns, 0, 0, s.x_full[ring.stage]);
      if (++block == phase.k_blocks) block = 0;
    }
  }
  LetSuccessorStart();
  LeaveGrid(p);  // not before the loop: x would wait for its trip
}

// By one warp: rstd of every token from the sums of squares of the phase before, for phases 1 and
// 3, each at a place and with a barrier of its own.
template <typename Shape>
__device__ void ComputeScales(const ChainParameters& p, ChainShared<Shape>& s) {
  constexpr int kLanes = Shape::kTokens / 4, kRows = 32 / kLanes;  // lanes a row, rows together
  constexpr int kAhead = kRows == 16 ? 10 : kRows == 2 ? 40 : 20;  // rows of a lane, read together
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

}  // namespace coppice::cuda
