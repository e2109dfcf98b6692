// SPDX-License-Identifier: Apache-2.0
#include "cpu/residual_norm.h"

#include <cmath>

#include "cpu/activation.h"

namespace fastasr::cpu {
namespace {

// Sums over a row: 16 lanes add four terms each in the compute type, then go on in double. ESPnet's epsilon is 1e-12,
// so rows of almost equal elements are normalised by their rounding errors: those must not be ours.
constexpr int64_t kLanes = 16, kChain = 4, kBlock = kLanes * kChain;

template <typename C, typename F>
FASTASR_INLINE double row_sum(int64_t n, const F& term) {
  alignas(64) double total[kLanes] = {};
  int64_t j = 0;
  for (; j + kBlock <= n; j += kBlock) {
    alignas(64) C part[kLanes] = {};
    for (int64_t k = 0; k < kChain; k++) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes; l++) part[l] += term(j + k * kLanes + l);
    }
#pragma omp simd
    for (int64_t l = 0; l < kLanes; l++) total[l] += static_cast<double>(part[l]);
  }
  for (; j < n; j++) total[j % kLanes] += static_cast<double>(term(j));
  double sum = 0;
  for (int64_t l = 0; l < kLanes; l++) sum += total[l];
  return sum;
}

// centred = t - mean(t), in place; returns 1 / sqrt(var + eps). The mean is subtracted in two parts, exact to double.
template <typename C>
FASTASR_INLINE C centre(C* __restrict t, int64_t n, double eps) {
  const double mean = row_sum<C>(n, [&](int64_t j) { return t[j]; }) / static_cast<double>(n);
  const C high = static_cast<C>(mean), low = static_cast<C>(mean - static_cast<double>(high));
#pragma omp simd
  for (int64_t j = 0; j < n; j++) t[j] = (t[j] - high) - low;
  if constexpr (sizeof(C) == sizeof(double)) {  // the sum above was rounded: what is left of the mean
    const C rest = row_sum<C>(n, [&](int64_t j) { return t[j]; }) / static_cast<C>(n);
    for (int64_t j = 0; j < n; j++) t[j] -= rest;
  }
  const double square = row_sum<C>(n, [&](int64_t j) { return t[j] * t[j]; });
  return static_cast<C>(1 / std::sqrt(square / static_cast<double>(n) + eps));
}

// t and, gated, a = act(candidate + hidden) mask, s = sigmoid(update), r = 1 - s, slope = act' mask.
template <typename C>
struct Row {
  C *t, *a, *s, *r, *slope;
};

template <bool kSlopes, typename T, typename C = compute_t<T>>
FASTASR_INLINE void mix(const ResidualNorm<T>& p, int64_t row, const Row<C>& v) {
  const int64_t n = p.channels;
  const T* __restrict x = p.x.data + row * p.x.stride, * __restrict u = p.update.data + row * p.update.stride;
  C* __restrict t = v.t, * __restrict a = v.a, * __restrict s = v.s, * __restrict r = v.r, * __restrict slope = v.slope;
  if (!p.candidate.data) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) t[j] = load(x[j]) + load(u[j]);
    return;
  }
  const T* __restrict c = p.candidate.data + row * p.candidate.stride;
  const T* __restrict h = p.hidden.data + row * p.hidden.stride;
#pragma omp simd
  for (int64_t j = 0; j < n; j++) a[j] = load(c[j]) + load(h[j]);
  if constexpr (kSlopes)
    activate_with_slope(p.activation, a, slope, n);
  else
    activate(p.activation, a, n);
  if (p.mask) {
    const C* __restrict m = p.mask + row * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) a[j] *= m[j];
    if constexpr (kSlopes) {
#pragma omp simd
      for (int64_t j = 0; j < n; j++) slope[j] *= m[j];
    }
  }
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const C xj = load(x[j]);
    C sj, rj;
    sigmoid_pair(load(u[j]), &sj, &rj);
    t[j] = xj + sj * (a[j] - xj);
    if constexpr (kSlopes) s[j] = sj, r[j] = rj;
  }
}

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE Row<C> rows_of(C* scratch, int64_t n) {
  return {scratch, scratch + n, scratch + 2 * n, scratch + 3 * n, scratch + 4 * n};
}

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void forward_body(const ResidualNorm<T>& p, int64_t begin, int64_t end, T* __restrict y, C* scratch) {
  const int64_t n = p.channels;
  const Row<C> v = rows_of<T>(scratch, n);
  const C* __restrict w = p.weight, * __restrict b = p.bias;
  for (int64_t i = begin; i < end; i++) {
    mix<false>(p, i, v);
    C* __restrict t = v.t;
    const C scale = centre(t, n, p.eps);
    T* __restrict out = y + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) store(&out[j], t[j] * scale * w[j] + b[j]);
  }
}

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void backward_body(const ResidualNorm<T>& p, const T* __restrict grad, int64_t begin, int64_t end,
                                  T* __restrict dx, T* __restrict dupdate, T* __restrict dsum, C* __restrict dweight,
                                  C* __restrict dbias, C* scratch) {
  const int64_t n = p.channels;
  const Row<C> v = rows_of<T>(scratch, n);
  C* __restrict d = scratch + 5 * n;
  const C* __restrict w = p.weight;
  for (int64_t j = 0; j < n; j++) dweight[j] = 0, dbias[j] = 0;
  for (int64_t i = begin; i < end; i++) {
    mix<true>(p, i, v);
    C* __restrict t = v.t, * __restrict a = v.a, * __restrict s = v.s, * __restrict r = v.r, * __restrict slope = v.slope;
    const C scale = centre(t, n, p.eps);
    const T* __restrict g = grad + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C gj = load(g[j]);
      t[j] *= scale;
      dweight[j] += gj * t[j];
      dbias[j] += gj;
      d[j] = gj * w[j];
    }
    const double size = static_cast<double>(n);
    const C mean = static_cast<C>(row_sum<C>(n, [&](int64_t j) { return d[j]; }) / size);
    const C along = static_cast<C>(row_sum<C>(n, [&](int64_t j) { return d[j] * t[j]; }) / size);
    T* __restrict ox = dx + i * n;
    if (!p.candidate.data) {
#pragma omp simd
      for (int64_t j = 0; j < n; j++) store(&ox[j], (d[j] - mean - t[j] * along) * scale);
      continue;
    }
    const T* __restrict x = p.x.data + i * p.x.stride;
    T* __restrict ou = dupdate + i * n, * __restrict os = dsum + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C dt = (d[j] - mean - t[j] * along) * scale, ds = dt * s[j];
      store(&ox[j], dt * r[j]);
      store(&ou[j], ds * r[j] * (a[j] - load(x[j])));
      store(&os[j], ds * slope[j]);
    }
  }
}

}  // namespace

#define FASTASR_DEFINE(T)                                                                                            \
  FASTASR_CLONES void residual_norm_forward(const ResidualNorm<T>& p, int64_t begin, int64_t end, T* y,              \
                                            compute_t<T>* scratch) {                                                 \
    forward_body<T>(p, begin, end, y, scratch);                                                                      \
  }                                                                                                                  \
  FASTASR_CLONES void residual_norm_backward(const ResidualNorm<T>& p, const T* grad, int64_t begin, int64_t end,    \
                                             T* dx, T* dupdate, T* dsum, compute_t<T>* dweight, compute_t<T>* dbias, \
                                             compute_t<T>* scratch) {                                                \
    backward_body<T>(p, grad, begin, end, dx, dupdate, dsum, dweight, dbias, scratch);                               \
  }

FASTASR_DEFINE(float)
FASTASR_DEFINE(double)
FASTASR_DEFINE(bfloat16)
FASTASR_DEFINE(float16)

}  // namespace fastasr::cpu
