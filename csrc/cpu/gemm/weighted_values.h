// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// Values weighted by attention weights that lie in memory: out[i][c] = sum_j w[i][j] v[j][c], for few columns (12 a
// head in Zipformer), where a BLAS is far from its rate: reading w is half of the work. A row of w meets 16 columns at
// a time, from values packed so. Sums run in chains of 128 terms, which are then added.
namespace fastasr::cpu {

constexpr int64_t kValueLanes = 16;

FASTASR_INLINE constexpr int64_t packed_values_size(int64_t sources, int64_t columns) {
  return (columns + kValueLanes - 1) / kValueLanes * kValueLanes * sources;
}

struct WeightedValues {
  // Packs v (sources, columns), rows `stride` apart, in groups of 16 columns: (groups, sources, 16), zeros behind the
  // last.
  void (*pack)(const float* v, int64_t stride, int64_t sources, int64_t columns, float* packed);
  // Computes `rows` rows of w and out, w_stride and out_stride apart.
  void (*run)(const float* w, int64_t w_stride, int64_t rows, int64_t sources, const float* packed, int64_t columns,
              float* out, int64_t out_stride);
  // Does the same for the transpose of w, of which it computes `rows` rows: out[i][c] = sum_j w[j][i] v[j][c].
  void (*transposed)(const float* w, int64_t w_stride, int64_t rows, int64_t sources, const float* packed,
                     int64_t columns, float* out, int64_t out_stride);
};

}  // namespace fastasr::cpu
