// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/whitening_gradient.h"

#include <algorithm>

namespace fastasr::cpu {
namespace {

// Columns that are read at a time: a line of the cache then serves as many rows.
constexpr int64_t kTile = 16;

void centre(const float* __restrict x, int64_t stride, const float* __restrict mean, float* __restrict y, int64_t rows,
            int64_t channels) {
  for (int64_t r = 0; r < rows; r++, x += stride, y += channels) {
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) y[j] = x[j] - mean[j];
  }
}

void mirror(float* matrix, int64_t n, int64_t block, double* squares, int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += kTile) {
    const int64_t last = std::min(first + kTile, end);
    for (int64_t c = 0; c < (last - 1) / block * block; c += kTile) {
      for (int64_t i = first; i < last; i++) {
        const int64_t known = std::min(c + kTile, i / block * block);
        for (int64_t j = c; j < known; j++) matrix[i * n + j] = matrix[j * n + i];
      }
    }
    for (int64_t i = first; i < last; i++) {
      const float* row = matrix + i * n;
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; j++) sum += static_cast<double>(row[j]) * static_cast<double>(row[j]);
      squares[i] = sum;
    }
  }
}

void add(const float* __restrict grad, const float* __restrict change, const float* __restrict mean, float scale,
         float* __restrict y, int64_t rows, int64_t channels) {
  for (int64_t r = 0; r < rows; r++, grad += channels, change += channels, y += channels) {
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) y[j] = grad[j] + scale * (change[j] - mean[j]);
  }
}

}  // namespace

FASTASR_KERNELS_FLOAT(WhiteningKernels, .centre = centre, .mirror = mirror, .add = add)

}  // namespace fastasr::cpu
