// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/bypass.h"

namespace fastasr::cpu {
namespace {

template <typename T>
void forward(const T* __restrict x_orig, const T* __restrict x, const T* __restrict scale, T* __restrict y,
             int64_t rows, int64_t period) {
  using C = compute_t<T>;
  for (int64_t r = 0; r < rows; r++, x_orig += period, x += period, y += period) {
#pragma omp simd
    for (int64_t j = 0; j < period; j++) {
      const C o = load(x_orig[j]);
      store(&y[j], o + (load(x[j]) - o) * load(scale[j]));
    }
  }
}

template <typename T>
void backward(const T* __restrict grad, const T* __restrict x_orig, const T* __restrict x, const T* __restrict scale,
              T* __restrict dx_orig, T* __restrict dx, compute_t<T>* __restrict dscale, int64_t rows, int64_t period) {
  using C = compute_t<T>;
  for (int64_t j = 0; j < period; j++) dscale[j] = 0;
  for (int64_t r = 0; r < rows; r++, grad += period, x_orig += period, x += period, dx_orig += period, dx += period) {
#pragma omp simd
    for (int64_t j = 0; j < period; j++) {
      const C g = load(grad[j]), d = g * load(scale[j]);
      dscale[j] += g * (load(x[j]) - load(x_orig[j]));
      store(&dx[j], d);
      store(&dx_orig[j], g - d);
    }
  }
}

}  // namespace

FASTASR_KERNELS(BypassKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
