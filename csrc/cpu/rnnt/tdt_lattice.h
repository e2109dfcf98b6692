// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/simd/kernels.h"

// The lattice of a token-and-duration transducer, one sequence. An arc of duration d leaves cell (t, u) for frame t +
// d:
//   p[t,u] = log(sum_{d>0} e^(p + y + z_d at (t-d, u)) + sum_d e^(p + x + z_d at (t-d, u-1))),  t < frames
//   score = log sum_{d>0} e^(p + y + z_d at (frames-d, symbols))
namespace fastasr::cpu {

struct TdtSize {
  int64_t symbols, frames;
  int64_t row;  // cells from one frame to the next in y and z; one less in x
  const int64_t* durations;
  int64_t count;
  // Returns the frames from an arc's first to its last, both counted: this many frames are in use at once.
  FASTASR_MEMBER int64_t window() const {
    int64_t longest = 0;
    for (int64_t i = 0; i < count; i++) longest = std::max(longest, std::min(durations[i], frames));
    return longest + 1;
  }
};

// Returns the elements of a row of shares, whatever the instruction set: whole vectors.
FASTASR_INLINE int64_t tdt_row(int64_t cells) { return (cells + 15) / 16 * 16; }
// Returns the elements of the scratch memory, which is aligned to 64 bytes.
FASTASR_INLINE int64_t tdt_scratch(const TdtSize& size) {
  return (2 * size.window() + 4 * size.count + 3) * (tdt_row(size.row) + 16);
}

// x is (frames, row - 1), y is (frames, row), z is (frames, row, count). Shares are (frames, 2 count, tdt_row(row)): of
// the blank arcs, then of the symbol arcs, that leave a cell.
template <typename C>
struct TdtLatticeKernels {
  // Returns the score, or a NaN if it read a NaN or +infinity. All of shares is written, unless it is null.
  C (*forward)(const TdtSize& size, const C* x, const C* y, const C* z, C* shares, C* scratch);
  // Writes the gradients of a score that is finite, for `grad` of it, in the cells of the sequence.
  void (*backward)(const TdtSize& size, C grad, const C* shares, C* dx, C* dy, C* dz, C* scratch);
};

}  // namespace fastasr::cpu
