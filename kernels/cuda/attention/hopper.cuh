// The Hopper instructions the attention kernels are made of: mbarriers, bulk tensor copies,
// warpgroup matrix products.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdint>

#include "kernels/cuda/attention/device_math.cuh"
#include "kernels/cuda/element.cuh"

namespace coppice::cuda {

struct Barrier {
  uint64_t word;

  __device__ void Init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(&word)),
                 "r"(arrivals));
  }
  __device__ __forceinline__ void Arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(&word)) : "memory");
  }
  // One arrival, once all 16-byte copies that this thread has begun (async_copy.cuh) are done.
  __device__ __forceinline__ void ArriveAfterCopies() {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(&word))
                 : "memory");
  }
  // One arrival; the phase also waits for `bytes` to land by bulk copy.
  __device__ __forceinline__ void ArriveExpecting(int bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&word)),
        "r"(bytes)
        : "memory");
  }
  __device__ __forceinline__ void Wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(SharedAddress(&word)),
        "r"(parity)
        : "memory");
  }
};

// Position in a ring of kStages buffers. A consumer waits for full[stage] with parity(), a producer
// for empty[stage] with parity() ^ 1, so that the first lap over fresh barriers passes at once.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Makes barrier initialisation visible to the copy engine.
__device__ inline void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Named barrier: blocks until `threads` threads came.
__device__ __forceinline__ void NamedSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts this thread's arrival at a named barrier that others wait at.
__device__ __forceinline__ void NamedArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Box at (column, head, row) of a [rows, heads, columns] tensor into shared memory.
__device__ __forceinline__ void LoadBox(void* to, const CUtensorMap& map, int column, int head,
                                        int row, Barrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, %4}], [%5];" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(head), "r"(row), "r"(SharedAddress(&full.word))
      : "memory");
}

// What becomes of lines of L2 that a copy reads.
__device__ __forceinline__ uint64_t EvictFirst() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t EvictNormal() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void LoadBox(void* to, const CUtensorMap& map, int column, int head,
                                        int row, Barrier& full, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(column), "r"(head), "r"(row), "r"(SharedAddress(&full.word)), "l"(policy)
      : "memory");
}

// `bytes` contiguous bytes, a multiple of 16, both ends 16-byte aligned.
__device__ __forceinline__ void LoadBytes(void* to, const void* from, int bytes, Barrier& full) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(&full.word))
      : "memory");
}

// Box at `first` of a row of words. LoadBytes would do; but compute-sanitizer's racecheck books
// what that writes on the issuing thread, and does not see that the barrier orders it before the
// readers.
__device__ __forceinline__ void LoadWords(void* to, const CUtensorMap& map, int first,
                                          Barrier& full) {
  asm volatile(
      "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2}], [%3];" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(first), "r"(SharedAddress(&full.word))
      : "memory");
}

__device__ __forceinline__ void StoreBox(const CUtensorMap& map, const void* from, int column,
                                         int head, int row) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map),
      "r"(column), "r"(head), "r"(row), "r"(SharedAddress(from))
      : "memory");
}
__device__ __forceinline__ void CommitStores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until the shared memory of all committed stores has been read.
__device__ __forceinline__ void WaitStoresRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Ordinary shared-memory writes before, copy engine and tensor cores after.
__device__ __forceinline__ void FenceAsyncShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A tile of R rows x D columns of 16 bits is D/64 panels of R x 64: 128 bytes a row, 128-byte
// swizzle (16-byte chunk c of row r sits at chunk c ^ (r & 7)), panels on 1024-byte boundaries. A
// box of 64 columns x R rows writes one panel.
inline constexpr int kPanel = 64;

// Matrix descriptor: address, leading and stride byte offsets in units of 16; swizzle (0 none, 1
// 128 bytes) at bit 62.
__device__ __forceinline__ uint64_t MatrixDescriptor(const void* p, uint32_t leading,
                                                     uint32_t stride, uint64_t swizzle) {
  return static_cast<uint64_t>((SharedAddress(p) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         swizzle << 62;
}
// Rows are the M or N index, columns the K index: 8-row groups lie 1024 bytes apart; the leading
// offset is unused.
__device__ __forceinline__ uint64_t ColumnsAreK(const void* tile) {
  return MatrixDescriptor(tile, 16, 1024, 1);
}
// Rows are the K index, columns the N index: 8-row groups lie 1024 bytes apart, 64-column panels
// `rows` * 128.
__device__ __forceinline__ uint64_t RowsAreK(const void* tile, int rows) {
  return MatrixDescriptor(tile, rows * 128, 1024, 1);
}
// Rows are the K index, 64 columns the M index, no swizzle: 8 x 8 blocks of 128 contiguous bytes,
// those of the next columns 128 bytes on (here the stride offset), those of the next rows 1024 (the
// leading offset).
__device__ __forceinline__ uint64_t CoreRowsAreK(const void* tile) {
  return MatrixDescriptor(tile, 1024, 128, 0);
}
// A descriptor `bytes` further on.
__device__ __forceinline__ uint64_t Advanced(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

// Warpgroup products m64nNk16, E x E -> fp32. Accumulator of lane l, warp w: element 4j + 2h + e is
// row 16w + l/4 + 8h, column 8j + 2(l % 4) + e.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kLeft committed groups are in flight.
template <int kLeft>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Keeps the compiler from moving reads or writes of registers the tensor cores use across this
// point.
template <int kCount>
__device__ __forceinline__ void Pin(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

template <int kParts, int kCount>
__device__ __forceinline__ void Pin(float (&r)[kParts][kCount]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) Pin(r[part]);
}

#define HOPPER_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HOPPER_ACC8(d, i) HOPPER_ACC4(d, i), HOPPER_ACC4(d, i + 4)
#define HOPPER_ACC32(d, i) \
  HOPPER_ACC8(d, i), HOPPER_ACC8(d, i + 8), HOPPER_ACC8(d, i + 16), HOPPER_ACC8(d, i + 24)
#define HOPPER_REGS_0                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define HOPPER_REGS_32                       \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"

// asm volatile of a matrix instruction over E: `before` ends with its shape, what follows its types
// comes with the operands.
#define HOPPER_MMA(E, before, ...)                      \
  if constexpr (kIsF16<E>) {                            \
    asm volatile(before ".f32.f16.f16 " __VA_ARGS__);   \
  } else {                                              \
    asm volatile(before ".f32.bf16.bf16 " __VA_ARGS__); \
  }

// One k16 step, A and B from shared memory, columns of both are k.
template <typename E>
__device__ __forceinline__ void WgmmaStep(float (&d)[32], uint64_t a, uint64_t b, bool add) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n64k16",
             "{" HOPPER_REGS_0 "}, %32, %33, p, 1, 1, 0, 0;\n}"
             : HOPPER_ACC32(d, 0)
             : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
template <typename E>
__device__ __forceinline__ void WgmmaStep(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n128k16",
             "{" HOPPER_REGS_0 ", " HOPPER_REGS_32 "}, %64, %65, p, 1, 1, 0, 0;\n}"
             : HOPPER_ACC32(d, 0), HOPPER_ACC32(d, 32)
             : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
// One k16 step, A from registers, rows of B are k. Adds to d.
template <typename E>
__device__ __forceinline__ void WgmmaStep(float (&d)[32], const uint32_t* a, uint64_t b) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n64k16",
             "{" HOPPER_REGS_0 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
             : HOPPER_ACC32(d, 0)
             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <typename E>
__device__ __forceinline__ void WgmmaStep(float (&d)[64], const uint32_t* a, uint64_t b) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n128k16",
             "{" HOPPER_REGS_0 ", " HOPPER_REGS_32 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
             : HOPPER_ACC32(d, 0), HOPPER_ACC32(d, 32)
             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// One k16 step, A and B from shared memory, rows of both are k. Adds to d.
template <typename E>
__device__ __forceinline__ void WgmmaStepRows(float (&d)[64], uint64_t a, uint64_t b) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n128k16",
             "{" HOPPER_REGS_0 ", " HOPPER_REGS_32 "}, %64, %65, p, 1, 1, 1, 1;\n}"
             : HOPPER_ACC32(d, 0), HOPPER_ACC32(d, 32)
             : "l"(a), "l"(b));
}
template <typename E>
__device__ __forceinline__ void WgmmaStepRows(float (&d)[32], uint64_t a, uint64_t b) {
  HOPPER_MMA(E,
             "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"
             "wgmma.mma_async.sync.aligned.m64n64k16",
             "{" HOPPER_REGS_0 "}, %32, %33, p, 1, 1, 1, 1;\n}"
             : HOPPER_ACC32(d, 0)
             : "l"(a), "l"(b));
}

// Tells the compiler that the old values are not needed: frees their registers until the next
// write.
template <int kCount>
__device__ __forceinline__ void Discard(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "=f"(r[i]));
}

// d[64, N] = A B^T over kDepth columns; A is 64 rows of a tile of kRowsA rows, B a tile of N rows.
// Commits one group.
template <typename E, int kDepth, int kRowsA, int kAccumulators>
__device__ __forceinline__ void MultiplyAbt(float (&d)[kAccumulators], uint64_t a, uint64_t b) {
  constexpr int kRowsB = 2 * kAccumulators;
  Discard(d);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    const int panel = k / kPanel, inside = k % kPanel * 2;
    WgmmaStep<E>(d, Advanced(a, panel * kRowsA * 128 + inside),
                 Advanced(b, panel * kRowsB * 128 + inside), k != 0);
  }
  WgmmaCommit();
}

// d[64, N] += A B; A [64, kDepth] in registers (4 words per 16 columns), B a tile of kDepth rows.
// Commits one group.
template <typename E, int kDepth, int kAccumulators>
__device__ __forceinline__ void MultiplyAdd(float (&d)[kAccumulators],
                                            const uint32_t (&a)[kDepth / 4], uint64_t b) {
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) WgmmaStep<E>(d, a + k / 4, Advanced(b, k * 128));
  WgmmaCommit();
}

// d[part][64, N] += A B for neighbouring column parts of B; A as above. Commits one group.
template <typename E, int kDepth, int kParts, int kAccumulators>
__device__ __forceinline__ void MultiplyAdd(float (&d)[kParts][kAccumulators],
                                            const uint32_t (&a)[kDepth / 4], uint64_t b) {
  constexpr int kPartBytes = 2 * kAccumulators / kPanel * kDepth * 128;
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      WgmmaStep<E>(d[part], a + k / 4, Advanced(b, part * kPartBytes + k * 128));
  }
  WgmmaCommit();
}

// d[64, N] += A^T B; A and B tiles of kDepth rows, A of 64 columns. Leaves the group open.
template <typename E, int kDepth, int kAccumulators>
__device__ __forceinline__ void MultiplyAddAtb(float (&d)[kAccumulators], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16)
    WgmmaStepRows<E>(d, Advanced(a, k * 128), Advanced(b, k * 128));
}

// Accumulators [64, 16 i] as A operand: word order (row, row + 8) x (columns, columns + 8).
template <typename E, int kCount>
__device__ __forceinline__ void PackOperand(uint32_t (&a)[kCount / 2], const float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) a[i] = PackPair<E>(d[2 * i], d[2 * i + 1]);
}

// Rounds this warpgroup's accumulators [64, 2 * kAccumulators] times `factor` (one per row half)
// into rows [row0, row0 + 64) of a swizzled tile of kRows rows.
template <int kRows, typename E, int kAccumulators>
__device__ __forceinline__ void StoreAccumulators(E* tile, int row0,
                                                  const float (&d)[kAccumulators], float factor0,
                                                  float factor1) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int row = row0 + warp * 16 + lane % 16;
  const uint32_t base = SharedAddress(tile) + row * 128;
#pragma unroll
  for (int i = 0; i < kAccumulators / 8; ++i) {  // 16 columns a step
    const int chunk = 2 * (i % 4) + lane / 16;
    const uint32_t at = base + i / 4 * kRows * 128 + ((chunk ^ (row & 7)) << 4);
    const float* x = d + 8 * i;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(PackPair<E>(x[0] * factor0, x[1] * factor0)),
                 "r"(PackPair<E>(x[2] * factor1, x[3] * factor1)),
                 "r"(PackPair<E>(x[4] * factor0, x[5] * factor0)),
                 "r"(PackPair<E>(x[6] * factor1, x[7] * factor1))
                 : "memory");
  }
}

}  // namespace coppice::cuda
