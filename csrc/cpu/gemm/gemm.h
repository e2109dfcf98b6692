// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// C = A B, plus a bias on every row, in float32, for operands of any strides, as a linear layer needs it forward and
// for both gradients. A and B are float or bfloat16. Two bfloat16 that follow each other along k make a word of four
// bytes, whose products one instruction adds (without it, kernels for bfloat16 are slower than those for float); sums
// are floats all the same. AMX's instruction adds the products of 16 rows, 16 columns and 32 terms. Operands are packed
// into panels as wide as a tile of registers; the products then read nothing but panels. With many rows both operands
// are packed once, beforehand; but rows of A whose terms lie next to each other are read where they lie: on a Zen 3
// core packing them takes a tenth of the time of a product with 192 columns. A tile over the end of a line of rows
// reads copies. With few rows B is most of the memory that a product touches, and packing it costs a fifth of the time
// of a product of 376 rows: `strips` packs it part by part into memory that stays in the second cache, and prefetches
// the next part. Sums run in chains of at most kGemmChain terms, which are then added: longer chains of floats would be
// less exact than a BLAS. The bits of an element depend on its row, its column and k alone, not on how the work is
// split.
namespace fastasr::cpu {

inline constexpr int64_t kGemmChain = 192;

// Rows that are `step` elements apart, or lie in lines of `line` rows, `next_line` apart, and these in maps of `lines`
// lines, `next_map` apart, as what the outputs of a convolution see.
struct Lines {
  int64_t line = 0, next_line = 0, lines = 0, next_map = 0;  // 0: one line of all rows

  int64_t at(int64_t i, int64_t step) const {
    if (!line) return i * step;
    return i / line / lines * next_map + i / line % lines * next_line + i % line * step;
  }
  // Says whether `count` rows from row i on lie in one line.
  bool whole(int64_t i, int64_t count) const { return !line || i % line + count <= line; }
};

template <typename T>
struct Gemm {
  const T* a;
  int64_t a_row, a_depth;  // strides
  const T* b;
  int64_t b_depth, b_column;
  const float* bias;  // n elements, or null
  float* c;           // rows of n elements, c_row apart
  int64_t c_row;
  int64_t m, n, k;              // k at least 1
  bool add = false;             // adds to what C holds
  const float* onto = nullptr;  // m rows of n elements, onto_row apart, that are added last; or null
  int64_t onto_row = 0;
  bool swoosh_l = false;       // applies SwooshL to the result
  int64_t chain = kGemmChain;  // words of a chain, at most kGemmChain: fewer are more exact and slower
  // Of float alone: where rows of A and C lie, and, if rows of A are one element apart, the terms of a row. If the
  // terms lie next to each other, they may be in `parts` of k, part_step apart.
  Lines a_lines{}, c_lines{}, depth_lines{};
  int64_t parts = 1, part_step = 0;
};

template <typename T>
struct GemmKernels {
  static constexpr bool kDotProducts = true;
  int64_t (*a_panels)(const Gemm<T>& g);  // counts panels of rows
  int64_t (*b_panels)(const Gemm<T>& g);  // counts panels of columns
  int64_t (*packed_a)(const Gemm<T>& g);  // words; 0 if the products read A where it lies
  int64_t (*packed_b)(const Gemm<T>& g);
  int64_t (*tasks)(const Gemm<T>& g);
  // Packs panels [begin, end) to their place in `packed`.
  void (*pack_a)(const Gemm<T>& g, float* packed, int64_t begin, int64_t end);
  void (*pack_b)(const Gemm<T>& g, float* packed, int64_t begin, int64_t end);
  // Runs tasks [begin, end) of the products of packed operands; many in one call are faster.
  void (*products)(const Gemm<T>& g, const float* a, const float* b, int64_t begin, int64_t end);
  // Returns into how many strips of columns `threads` threads should cut a product whose B is packed on the way; 0:
  // pack it beforehand.
  int64_t (*strip_count)(const Gemm<T>& g, int64_t threads);
  // Computes strips [begin, end) of `count` with packed A.
  void (*strips)(const Gemm<T>& g, const float* a, int64_t count, int64_t begin, int64_t end);
};

// The same for few rows, where reading B is most of the cost: B is read once, where it lies. Sums run in chains of at
// most 64 terms in every lane of a vector, so its bits differ from the product above; they do not depend on the number
// of rows either.
inline constexpr int64_t kFewRows = 15, kFewColumns = 8;

struct FewRowsGemm {
  // Returns groups of columns; 0 if there are more than kFewRows rows, fewer than kFewColumns columns, or inputs (k)
  // with gaps.
  int64_t (*groups)(const Gemm<float>& g);
  void (*products)(const Gemm<float>& g, int64_t begin, int64_t end);  // computes groups [begin, end)
};

}  // namespace fastasr::cpu
