// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "cpu/gemm/gemm.h"
#include "cpu/simd/vectors.simd.h"

namespace fastasr::cpu {
namespace {

// A tile's sums, a vector for each row of A and column of B, take the registers that a vector of each column and one of
// a row leave. With few rows a tile has twice the columns, to have enough work while memory answers.
constexpr int kLanes = Lanes<float>::count;
constexpr int64_t kRows = 6, kWideRows = kRegisters == 32 ? 3 : 2;
constexpr int64_t kNarrow = kRegisters == 32 ? 4 : 2, kWide = 2 * kNarrow;
static_assert(kWide <= kFewColumns);
constexpr int64_t kDepth = 64 * kLanes;  // the inputs of one chain
constexpr int64_t kLine = 64 / sizeof(float);
constexpr int kSecondLevel = 2;  // __builtin_prefetch's second level

// Describes a tile: rows of A from `a` on, columns of B from `b` on, inputs [0, depth), and where to prefetch.
struct Tile {
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_column, depth;
  const float* ahead;
};

template <int64_t kTileRows, int64_t kColumns>
FASTASR_INLINE void step(const float* a, int64_t a_row, const float* b, int64_t b_column,
                         Vector<float> (&sum)[kTileRows][kColumns]) {
  Vector<float> column[kColumns];
#pragma GCC unroll 8
  for (int64_t j = 0; j < kColumns; j++) column[j] = at(b + j * b_column);
#pragma GCC unroll 8
  for (int64_t i = 0; i < kTileRows; i++) {
    const Vector<float> row = at(a + i * a_row);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kColumns; j++) sum[i][j] += row * column[j];
  }
}

// Sets out[i][j] to the products of the tile, and prefetches kLines lines at each step. Each shape has its own
// function: several tiles inlined into one would spill.
template <int64_t kTileRows, int64_t kColumns, int64_t kLines>
__attribute__((noinline)) void tile(const Tile& t, float* out) {
  Vector<float> sum[kTileRows][kColumns] = {};
  const float* ahead = t.ahead;
  int64_t k = 0;
  for (; k + kLanes <= t.depth; k += kLanes, ahead += kLines * kLine) {
#pragma GCC unroll 8
    for (int64_t line = 0; line < kLines; line++) __builtin_prefetch(ahead + line * kLine, 0, kSecondLevel);
    step(t.a + k, t.a_row, t.b + k, t.b_column, sum);
  }
  if (k < t.depth) {  // the rest, padded with zeros
    alignas(64) float rest[kTileRows + kColumns][kLanes] = {};
    for (int64_t i = 0; i < kTileRows; i++) std::copy_n(t.a + i * t.a_row + k, t.depth - k, rest[i]);
    for (int64_t j = 0; j < kColumns; j++) std::copy_n(t.b + j * t.b_column + k, t.depth - k, rest[kTileRows + j]);
    step(rest[0], kLanes, rest[kTileRows], kLanes, sum);
  }
  constexpr int64_t kSums = kTileRows * kColumns;
#pragma GCC unroll 8
  for (int64_t first = 0; first < kSums; first += kLanes) {
    Vector<float> some[kLanes] = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; i++)
      if (first + i < kSums) some[i] = sum[(first + i) / kColumns][(first + i) % kColumns];
    sum_each<float>(some);
    put(out + first, some[0]);
  }
}

// Tiles of `columns` columns and 1, 2, ... rows, and the lines that each prefetches at a step.
struct Tiles {
  int64_t columns, lines;
  void (*rows[kRows])(const Tile&, float*);
};
template <int64_t kColumns, int64_t kParts>
constexpr Tiles tiles() {
  constexpr int64_t kLines = std::max<int64_t>(1, kColumns * kLanes / kLine / kParts);
  if constexpr (kColumns == kWide) {
    if constexpr (kWideRows == 2) return {kColumns, kLines, {tile<1, kWide, kLines>, tile<2, kWide, kLines>}};
    return {kColumns, kLines, {tile<1, kWide, kLines>, tile<2, kWide, kLines>, tile<kWideRows, kWide, kLines>}};
  } else {
    return {kColumns,
            kLines,
            {tile<1, kColumns, kLines>, tile<2, kColumns, kLines>, tile<3, kColumns, kLines>, tile<4, kColumns, kLines>,
             tile<5, kColumns, kLines>, tile<6, kColumns, kLines>}};
  }
}
constexpr Tiles kWideTiles = tiles<kWide, 1>(), kOnePart = tiles<kNarrow, 1>(), kSomeParts = tiles<kNarrow, 2>();

const Tiles& tiles_of(const Gemm<float>& g) {
  return g.m <= kWideRows ? kWideTiles : g.m <= kRows ? kOnePart : kSomeParts;
}

int64_t groups(const Gemm<float>& g) {
  const bool fits = g.m > 0 && g.m <= kFewRows && g.n >= kFewColumns && g.a_depth == 1 && g.b_depth == 1;
  const int64_t columns = tiles_of(g).columns;
  return fits ? (g.n + columns - 1) / columns : 0;
}

// Prefetches the next group's columns, which lie behind those of this one in most weights, in the order in which they
// lie in memory: 35 GB/s on one Zen 5 core that can read 43, against 25 if columns side by side are prefetched. They go
// into the second level, for the reason that skinny_gemm.simd.cpp states: with 6 rows 85 GFLOP/s of one Zen 4 core
// instead of 42, with 15 rows 97 instead of 64.
void products(const Gemm<float>& g, int64_t begin, int64_t end) {
  const Tiles& t = tiles_of(g);
  const int64_t parts = (g.m + kRows - 1) / kRows;  // parts of equal height: 4 + 4 rows, not 6 + 2
  alignas(64) float out[kRows * kNarrow + kLanes];
  for (int64_t group = begin; group < end; group++) {
    // the last group begins earlier where it would reach beyond the columns, and writes only what is its own
    const int64_t own = group * t.columns, j = std::min(own, g.n - t.columns);
    const float* ahead = g.b + (j + t.columns) * g.b_column;
    for (int64_t k = 0; k < g.k; k += kDepth) {
      const int64_t depth = std::min(kDepth, g.k - k);
      for (int64_t part = 0; part < parts; part++, ahead += depth / kLanes * t.lines * kLine) {
        const int64_t i = g.m * part / parts, rows = g.m * (part + 1) / parts - i;
        t.rows[rows - 1]({g.a + i * g.a_row + k, g.a_row, g.b + j * g.b_column + k, g.b_column, depth, ahead}, out);
        for (int64_t r = 0; r < rows; r++)
          for (int64_t c = own - j; c < t.columns; c++) {
            float& y = g.c[(i + r) * g.c_row + j + c];
            y = (k || g.add ? y : g.bias ? g.bias[j + c] : 0.0f) + out[r * t.columns + c];
          }
      }
    }
  }
}

}  // namespace

FASTASR_KERNELS_FLOAT(FewRowsGemm, .groups = groups, .products = products)

}  // namespace fastasr::cpu
