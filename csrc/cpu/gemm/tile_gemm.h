// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// Products of small tiles, 8 rows by 32 columns, over operands packed in panels 32 wide; the whole tile stays in
// registers. Sums run in chains of at most 64 terms, which are then added: longer chains of floats would be less exact
// than a BLAS.
namespace fastasr::cpu {

constexpr int64_t kTileRows = 8, kPanel = 32;

// A part of a tile: the first `rows` rows, a multiple of 4, and the first `columns` columns, a multiple of 8. A call
// may overwrite what is beyond.
struct TilePart {
  int64_t rows = kTileRows, columns = kPanel;
};

// c[m][n] (+)= sum over k < depth of a(m, k) b[k][n], b and c with rows of 32. `add`: onto what c holds.
// rows: a(m, 32 i + k) = a[i a_block + 32 m + k].  columns: a(m, k) = a[32 k + m].
template <typename C>
struct TileGemm {
  void (*rows)(const C* a, int64_t a_block, const C* b, int64_t depth, C* c, bool add, TilePart part);
  void (*columns)(const C* a, const C* b, int64_t depth, C* c, bool add, TilePart part);
};

template <typename C>
FASTASR_INLINE void tile_rows(const C* a, int64_t a_block, const C* b, int64_t depth, C* c, bool add,
                              TilePart part = {}) {
  kernels<TileGemm<C>>().rows(a, a_block, b, depth, c, add, part);
}
template <typename C>
FASTASR_INLINE void tile_columns(const C* a, const C* b, int64_t depth, C* c, bool add, TilePart part = {}) {
  kernels<TileGemm<C>>().columns(a, b, depth, c, add, part);
}

}  // namespace fastasr::cpu
