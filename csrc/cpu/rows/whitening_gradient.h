// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// The passes of the gradient of Zipformer's Whiten beside its two products, see fastasr/ops/whitening_gradient.py.
namespace fastasr::cpu {

struct WhiteningKernels {
  // y = x - mean; rows of x lie `stride` apart, those of y follow each other. The mean is per channel.
  void (*centre)(const float* x, int64_t stride, const float* mean, float* y, int64_t rows, int64_t channels);
  // Completes rows [begin, end) of a symmetric matrix (n, n): `block` rows at a time have their columns from the
  // diagonal block on, and the others come from the rows above. `squares` gets the sum of the squares of each row.
  void (*mirror)(float* matrix, int64_t n, int64_t block, double* squares, int64_t begin, int64_t end);
  // y = grad + scale (change - mean), dense rows.
  void (*add)(const float* grad, const float* change, const float* mean, float scale, float* y, int64_t rows,
              int64_t channels);
};

}  // namespace fastasr::cpu
