// SPDX-License-Identifier: Apache-2.0
#include "cpu/bypass.h"

namespace fastasr::cpu {
namespace {

template <typename T>
FASTASR_INLINE void forward_body(const T* __restrict x_orig, const T* __restrict x, const T* __restrict scale,
                                 T* __restrict y, int64_t rows, int64_t period) {
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
FASTASR_INLINE void backward_body(const T* __restrict grad, const T* __restrict x_orig, const T* __restrict x,
                                  const T* __restrict scale, T* __restrict dx_orig, T* __restrict dx,
                                  compute_t<T>* __restrict dscale, int64_t rows, int64_t period) {
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

#define FASTASR_DEFINE(T)                                                                                            \
  FASTASR_CLONES void bypass_forward(const T* x_orig, const T* x, const T* scale, T* y, int64_t rows,                \
                                     int64_t period) {                                                               \
    forward_body<T>(x_orig, x, scale, y, rows, period);                                                              \
  }                                                                                                                  \
  FASTASR_CLONES void bypass_backward(const T* grad, const T* x_orig, const T* x, const T* scale, T* dx_orig, T* dx, \
                                      compute_t<T>* dscale, int64_t rows, int64_t period) {                          \
    backward_body<T>(grad, x_orig, x, scale, dx_orig, dx, dscale, rows, period);                                     \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
