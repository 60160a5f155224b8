// Two small matrix products in registers; what each computes is said in kernels.h. Include from
// kernels.cc only.
//
// Both keep a block of C in registers and read each loaded vector several times. With 32 vector
// registers (AVX-512) a block of 4 x 6 vectors needs 10 loads for 24 multiply-adds, so the
// multipliers are the bound.
#pragma once

#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/simd/vec.h"

namespace {

using coppice::cpu::DotGemmArgs;

constexpr bool kManyRegisters = kLanes == 16;

// ---- DotGemm: vectors run along k, so that A and B are both read as they lie; one sum across
// lanes at the end.

// Rows of A by rows of B in one block; up to kTallRows rows of A go into one block of their own
// shape, so that B, which then comes from memory, is read once.
constexpr int64_t kDotRows = kManyRegisters ? 4 : 2;
constexpr int64_t kDotCols = kManyRegisters ? 6 : 4;
constexpr int64_t kTallRows = 2 * kDotRows;
constexpr int64_t kTallCols = kDotCols / 2;

template <int64_t kRows, int64_t kCols>
inline __attribute__((always_inline)) void DotStep(const float* a, int64_t a_row, const float* b,
                                                   int64_t b_row, int64_t count, Vec* sums) {
  Vec bv[kCols];
#pragma GCC unroll 8
  for (int64_t j = 0; j < kCols; ++j) bv[j] = Load(b + j * b_row, count);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
    const Vec av = Load(a + i * a_row, count);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kCols; ++j) sums[i * kCols + j] += av * bv[j];
  }
}

template <int64_t kRows, int64_t kCols>
void DotBlock(const DotGemmArgs& g, int64_t row, int64_t col) {
  constexpr int64_t kGroups = (kRows * kCols + kLanes - 1) / kLanes;
  Vec sums[kGroups * kLanes] = {};
  const float* a = g.a + row * g.a_row;
  const float* b = g.b + col * g.b_row;
  // The first rows of A meet each row of B while it comes from memory: ask for the next rows in
  // time.
  const int64_t ahead = row == 0 ? kCols * g.b_row : 0;
  int64_t p = 0;
  for (; p + kLanes <= g.k; p += kLanes) {
    if (ahead > 0) {
      for (int64_t j = 0; j < kCols; ++j) __builtin_prefetch(b + ahead + j * g.b_row + p);
    }
    DotStep<kRows, kCols>(a + p, g.a_row, b + p, g.b_row, kLanes, sums);
  }
  if (p < g.k) DotStep<kRows, kCols>(a + p, g.a_row, b + p, g.b_row, g.k - p, sums);
  float totals[kGroups * kLanes];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kGroups; ++i) Store(totals + i * kLanes, SumEach(sums + i * kLanes));
  for (int64_t i = 0; i < kRows; ++i) {
    float* c = g.c + (row + i) * g.c_row + col;
    for (int64_t j = 0; j < kCols; ++j) {
      const float total = totals[i * kCols + j];
      c[j] = g.accumulate ? c[j] + total : total;
    }
  }
}

// Rows [row, m) of A against kCols rows of B, kRows at a time, then fewer.
template <int64_t kRows, int64_t kCols>
void DotPanel(const DotGemmArgs& g, int64_t row, int64_t col) {
  for (; row + kRows <= g.m; row += kRows) DotBlock<kRows, kCols>(g, row, col);
  if constexpr (kRows > 1) {
    if (row < g.m) DotPanel<kRows / 2, kCols>(g, row, col);
  }
}

template <int64_t kRows, int64_t kCols>
void DotPanels(const DotGemmArgs& g) {
  int64_t col = 0;
  for (; col + kCols <= g.n; col += kCols) DotPanel<kRows, kCols>(g, 0, col);
  for (; col < g.n; ++col) DotPanel<kRows, 1>(g, 0, col);
}

void DotGemm(const DotGemmArgs& g) {
  if (g.m > kDotRows && g.m <= kTallRows) return DotPanels<kTallRows, kTallCols>(g);
  DotPanels<kDotRows, kDotCols>(g);
}

// ---- TileGemm: vectors run along the columns of B and C; A is read one value at a time, so any
// strides do.

// C[i, j] += sum over p of A[i, p] B[p, j]; n is a multiple of 16, rows of B and C are dense.
struct TileGemmArgs {
  int64_t m, n, k;
  const float* a;
  int64_t a_row, a_col;
  const float* b;
  float* c;
};

constexpr int64_t kTileRows = 6;
constexpr int64_t kTileVecs = kManyRegisters ? 4 : 2;

template <int64_t kRows, int64_t kVecs>
void TileBlock(const TileGemmArgs& g, int64_t row, int64_t col) {
  Vec sums[kRows][kVecs];
  float* c = g.c + row * g.n + col;
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVecs; ++j) sums[i][j] = Load(c + i * g.n + j * kLanes);
  }
  const float* a = g.a + row * g.a_row;
  const float* b = g.b + col;
  for (int64_t p = 0; p < g.k; ++p, a += g.a_col, b += g.n) {
    Vec bv[kVecs];
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVecs; ++j) bv[j] = Load(b + j * kLanes);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      const float value = a[i * g.a_row];
#pragma GCC unroll 8
      for (int64_t j = 0; j < kVecs; ++j) sums[i][j] += value * bv[j];
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int64_t j = 0; j < kVecs; ++j) Store(c + i * g.n + j * kLanes, sums[i][j]);
  }
}

template <int64_t kVecs>
void TilePanel(const TileGemmArgs& g, int64_t col) {
  int64_t row = 0;
  for (; row + kTileRows <= g.m; row += kTileRows) TileBlock<kTileRows, kVecs>(g, row, col);
  if (row + 3 <= g.m) {
    TileBlock<3, kVecs>(g, row, col);
    row += 3;
  }
  for (; row < g.m; ++row) TileBlock<1, kVecs>(g, row, col);
}

void TileGemm(const TileGemmArgs& g) {
  int64_t col = 0;
  for (; col + kTileVecs * kLanes <= g.n; col += kTileVecs * kLanes) TilePanel<kTileVecs>(g, col);
  for (; col < g.n; col += kLanes) TilePanel<1>(g, col);
}

}  // namespace
