// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

namespace fastasr::cpu {

constexpr int64_t kStripe = 32;  // channels of a row
constexpr int64_t kTile = 8;     // rows of a tile

// The tiles of depthwise convolutions over time: see tile_of in depthwise.simd.h. Tiles of four rows cover short
// remainders. `slide` and `out` have a tile's rows, whatever `rows` is; the sums beyond `rows` are discarded.
template <typename C>
struct DepthwiseTiles {
  void (*set)(int64_t rows, const C* slide, const C* fixed, int64_t fixed_stride, int64_t n, C* out);
  void (*add)(int64_t rows, const C* slide, const C* fixed, int64_t fixed_stride, int64_t n, C* out);
};

}  // namespace fastasr::cpu
