// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bias_norm.h"

#include <cmath>

#include "cpu/rows/row_statistics.h"

namespace fastasr::cpu {
namespace {

template <typename T>
FASTASR_INLINE double squared_distance(const T* __restrict x, const T* __restrict bias, int64_t channels) {
  return row_sum<compute_t<T>>(channels, [&](int64_t j) {
    const compute_t<T> d = load(x[j]) - load(bias[j]);
    return d * d;
  });
}

// This sum is in double from the start: its terms cancel, and dlog_scale is a sum of these sums.
template <typename T>
FASTASR_INLINE double dot(const T* __restrict a, const T* __restrict b, int64_t channels) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < channels; j++) sum += static_cast<double>(load(a[j])) * static_cast<double>(load(b[j]));
  return sum;
}

template <typename T>
void forward(const T* __restrict x, const T* __restrict bias, double scale, T* __restrict y, int64_t rows,
             int64_t channels) {
  using C = compute_t<T>;
  for (int64_t r = 0; r < rows; r++, x += channels, y += channels) {
    const double mean = squared_distance(x, bias, channels) / static_cast<double>(channels);
    const C s = static_cast<C>(scale / std::sqrt(mean));
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) store(&y[j], load(x[j]) * s);
  }
}

// A row stays in L1 between its passes, so the memory traffic is one read of grad and x and one write of dx.
template <typename T>
void backward(const T* __restrict grad, const T* __restrict x, const T* __restrict bias, double scale, T* __restrict dx,
              compute_t<T>* __restrict dbias, double* dlog_scale, int64_t rows, int64_t channels) {
  using C = compute_t<T>;
  for (int64_t j = 0; j < channels; j++) dbias[j] = 0;
  double dscale = 0;
  for (int64_t r = 0; r < rows; r++, grad += channels, x += channels, dx += channels) {
    const double square = squared_distance(x, bias, channels);
    const double row_scale = scale / std::sqrt(square / static_cast<double>(channels));
    const double projected = dot(grad, x, channels) * row_scale;
    const C s = static_cast<C>(row_scale), k = static_cast<C>(projected / square);
    dscale += projected;
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) {
      const C d = k * (load(x[j]) - load(bias[j]));
      dbias[j] += d;
      store(&dx[j], load(grad[j]) * s - d);
    }
  }
  *dlog_scale = dscale;
}

}  // namespace

FASTASR_KERNELS(BiasNormKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
