// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The lattice of a transducer in a band: `window` cells of each frame, cell r of frame t being s = starts[t] + r. See
// docs/ops/rnnt_pruned_lattice.md.
namespace fastasr::cpu {

struct BandSize {
  int64_t frames, window;
  bool modified;
};

// One sequence: x, y, dx, dy (frames, window); starts (frames), which do not decrease.
template <typename C>
struct BandSequence {
  const int64_t* starts;
  int64_t s_begin, t_begin, s_end, t_end;
  const C *x, *y;  // forward
  C score;         // written by the forward, read by the backward
  C grad;          // backward, as dx and dy
  C *dx, *dy;
};

// This many sequences are worked on at once. Their shares are [frames][window + 1][kBandLanes].
inline constexpr int64_t kBandLanes = 16;
FASTASR_INLINE int64_t band_shares(const BandSize& size) { return size.frames * (size.window + 1) * kBandLanes; }
// Returns the elements of the scratch memory, which is aligned to 64 bytes.
FASTASR_INLINE int64_t band_scratch(const BandSize& size) { return 4 * (size.window + 1) * kBandLanes; }

// Each call takes at most kBandLanes sequences. The forward's shares may be null; every element of shares, and in the
// backward of dx and dy, is written.
template <typename C>
struct PrunedLatticeKernels {
  void (*forward)(const BandSize& size, BandSequence<C>* sequences, int64_t count, C* shares, C* scratch);
  void (*backward)(const BandSize& size, const BandSequence<C>* sequences, int64_t count, const C* shares, C* scratch);
};

}  // namespace fastasr::cpu
