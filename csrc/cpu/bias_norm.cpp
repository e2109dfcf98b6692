// SPDX-License-Identifier: Apache-2.0
#include "cpu/bias_norm.h"

#include <cmath>

namespace fastasr::cpu {
namespace {

template <typename T>
FASTASR_INLINE void forward_body(const T* __restrict x, const T* __restrict bias, compute_t<T> scale, T* __restrict y,
                                 int64_t rows, int64_t channels) {
  using C = compute_t<T>;
  for (int64_t r = 0; r < rows; r++, x += channels, y += channels) {
    C sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < channels; j++) {
      const C d = load(x[j]) - load(bias[j]);
      sum += d * d;
    }
    const C s = scale / std::sqrt(sum / static_cast<C>(channels));
#pragma omp simd
    for (int64_t j = 0; j < channels; j++) store(&y[j], load(x[j]) * s);
  }
}

// A row stays in L1 between its two passes, so the memory traffic is one read of grad and x and one write of dx.
template <typename T>
FASTASR_INLINE void backward_body(const T* __restrict grad, const T* __restrict x, const T* __restrict bias,
                                  compute_t<T> scale, T* __restrict dx, compute_t<T>* __restrict dbias,
                                  double* dlog_scale, int64_t rows, int64_t channels) {
  using C = compute_t<T>;
  for (int64_t j = 0; j < channels; j++) dbias[j] = 0;
  double dscale = 0;
  for (int64_t r = 0; r < rows; r++, grad += channels, x += channels, dx += channels) {
    C sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t j = 0; j < channels; j++) {
      const C v = load(x[j]), d = v - load(bias[j]);
      sum += d * d;
      dot += load(grad[j]) * v;
    }
    const C s = scale / std::sqrt(sum / static_cast<C>(channels));
    const C k = dot * s / sum;
    dscale += static_cast<double>(dot * s);
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

#define FASTASR_DEFINE(T)                                                                                           \
  FASTASR_CLONES void bias_norm_forward(const T* x, const T* bias, compute_t<T> scale, T* y, int64_t rows,          \
                                        int64_t channels) {                                                         \
    forward_body<T>(x, bias, scale, y, rows, channels);                                                             \
  }                                                                                                                 \
  FASTASR_CLONES void bias_norm_backward(const T* grad, const T* x, const T* bias, compute_t<T> scale, T* dx,       \
                                         compute_t<T>* dbias, double* dlog_scale, int64_t rows, int64_t channels) { \
    backward_body<T>(grad, x, bias, scale, dx, dbias, dlog_scale, rows, channels);                                  \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
