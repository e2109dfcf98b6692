// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/norm_activation.h"

#include <type_traits>

#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void widen_limited(const NormActivation<T>& p, int64_t row, C* __restrict to) {
  const T* __restrict x = p.x + row * p.channels;
  const C limit = p.limit;
#pragma omp simd
  for (int64_t j = 0; j < p.channels; j++) to[j] = limited<C>(load(x[j]), limit);
}

// Computes z = t scale weight + bias, in place.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void scale_and_shift(const NormActivation<T>& p, C scale, C* __restrict t) {
  const C* __restrict w = p.weight, * __restrict b = p.bias;
  if (b) {
#pragma omp simd
    for (int64_t j = 0; j < p.channels; j++) t[j] = t[j] * scale * w[j] + b[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < p.channels; j++) t[j] = t[j] * scale * w[j];
  }
}

template <typename T, typename C = compute_t<T>>
void forward(const NormActivation<T>& p, int64_t begin, int64_t end, T* y, RowStatistics<C>* statistics, C* scratch) {
  const int64_t n = p.channels;
  for (int64_t i = begin; i < end; i++)
    put_activated(p.activation, y + i * n, scratch, n, [&](C* t) {
      widen_limited<T>(p, i, t);
      const RowStatistics<C> row = statistics_of(p, t);
      if (statistics) statistics[i] = row;
      scale_and_shift<T>(p, row.scale, t);
    });
}

// Only the row's statistics are kept: z and the normalised row are computed again from x, which the first cache holds.
template <typename T, typename C = compute_t<T>>
void backward(const NormActivation<T>& p, const T* grad, const RowStatistics<C>* statistics, int64_t begin, int64_t end,
              T* dx, C* __restrict dweight, C* __restrict dbias, C* scratch) {
  const int64_t n = p.channels;
  const C* __restrict w = p.weight;
  C *q = scratch, *g = scratch + n;
  const C limit = p.limit;
  for (int64_t j = 0; j < n; j++) dweight[j] = 0, dbias[j] = 0;
  for (int64_t i = begin; i < end; i++) {
    const T* __restrict x = p.x + i * n;
    const auto t = [&](int64_t j) __attribute__((always_inline)) { return limited<C>(load(x[j]), limit); };
    RowStatistics<C> row{};
    if (statistics) {
      row = statistics[i];
    } else {
      widen_limited<T>(p, i, q);
      row = statistics_of(p, q);
    }
    const C high = row.high, low = row.low, scale = row.scale;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) q[j] = (t(j) - high) - low;
    scale_and_shift<T>(p, scale, q);
    activation_gradients<C>(p.activation, widened(grad + i * n, g, n), q, q, nullptr, n);
    Means<C> mean = project<C>(w, n, row, q, t, [](int64_t, C, C) {}, dweight, dbias);
    if (!p.centred) mean.d = 0;
    T* __restrict out = dx + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C normalised = ((t(j) - high) - low) * scale;
      const C d = (q[j] * w[j] - mean.d - normalised * mean.along) * scale;
      store(&out[j], passes<C>(load(x[j]), limit) ? d : C(0));
    }
  }
}

}  // namespace

FASTASR_KERNELS(NormActivationKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
