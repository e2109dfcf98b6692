// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The lattice of a transducer, one sequence: p[s,t] = log(e^(p[s-1,t'] + x[s-1,t']) + e^(p[s,t-1] + y[s,t-1])), t' = t
// in a regular lattice and t - 1 in a modified one.
namespace fastasr::cpu {

struct LatticeSize {
  int64_t symbols, frames;
  bool regular;
  // Returns the steps of cells: anti-diagonals s + t of a regular lattice, frames of a modified one.
  FASTASR_MEMBER int64_t steps() const { return frames + (regular ? symbols : 0); }
  FASTASR_MEMBER int64_t columns() const { return frames + (regular ? 1 : 0); }  // of x
};

// Shares have one row per step of this many elements, whatever the instruction set: the cells of a step, of which a
// regular lattice has at most frames + 1, rounded up to whole vectors.
FASTASR_INLINE int64_t lattice_row(const LatticeSize& size) {
  const int64_t all = (size.symbols + 16) / 16 * 16, diagonal = (size.frames + 63) / 16 * 16;
  return size.regular && diagonal < all ? diagonal : all;
}
// Returns the elements of the scratch memory, which is aligned to 64 bytes.
FASTASR_INLINE int64_t lattice_scratch(int64_t symbols) { return 34 * ((symbols + 16) / 16 * 16) + 32; }

// One sequence: x (symbols, columns) has rows x_row apart, y (symbols + 1, frames) has rows y_row apart.
template <typename C>
struct LatticeKernels {
  // Returns the score, or a NaN if it read a NaN. shares has steps * lattice_row elements, aligned to 64 bytes, or is
  // null.
  C (*forward)(const LatticeSize& size, const C* x, int64_t x_row, const C* y, int64_t y_row, C* shares, C* scratch);
  // Writes the gradients of a score that is finite, for `grad` of it; every element of dx and dy is written.
  void (*backward)(const LatticeSize& size, C grad, const C* shares, C* dx, int64_t x_row, C* dy, int64_t y_row,
                   C* scratch);
};

}  // namespace fastasr::cpu
