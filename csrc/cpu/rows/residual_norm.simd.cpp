// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/residual_norm.h"

#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

// t and, gated, a = act(candidate + hidden) mask, s = sigmoid(update), r = 1 - s, slope = act' mask.
template <typename C>
struct Row {
  C *t, *a, *s, *r, *slope;
};

template <bool kSlopes, typename T, typename C = compute_t<T>>
__attribute__((noinline)) void mix(const ResidualNorm<T>& p, int64_t row, const Row<C>& v) {
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
void forward(const ResidualNorm<T>& p, int64_t begin, int64_t end, T* __restrict y, RowStatistics<C>* statistics,
             C* scratch) {
  const int64_t n = p.channels;
  const Row<C> v = rows_of<T>(scratch, n);
  const C* __restrict w = p.weight, * __restrict b = p.bias;
  for (int64_t i = begin; i < end; i++) {
    mix<false>(p, i, v);
    C* __restrict t = v.t;
    const RowStatistics<C> row = centre(t, n, p.eps);
    if (statistics) statistics[i] = row;
    const C scale = row.scale;
    T* __restrict out = y + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) store(&out[j], t[j] * scale * w[j] + b[j]);
  }
}

// Takes one row after another and reads each from end to end. Four rows at once would read and write dweight and dbias
// less often, but on a Zen 5 core they took 1.6 to 2.3 times as long from 2000 rows of 512 on, and rows of 16-bit
// numbers, which have to be widened, 3 to 4 times at any size. A row's second pass computes d and n again from what the
// first cache still holds: to store them took 7 to 13 % longer on a Zen 4 core, whose stores of 64 bytes take two
// cycles.
template <typename T, typename C = compute_t<T>>
void plain_backward(const ResidualNorm<T>& p, const T* grad, const RowStatistics<C>* statistics, int64_t begin,
                    int64_t end, T* dx, C* __restrict dweight, C* __restrict dbias, C* scratch) {
  const int64_t n = p.channels;
  const Row<C> v = rows_of<T>(scratch, n);
  const C* __restrict w = p.weight;
  for (int64_t i = begin; i < end; i++) {
    RowStatistics<C> row{};
    if (statistics) {
      row = statistics[i];
    } else {
      mix<false>(p, i, v);
      row = centre(v.t, n, p.eps);
    }
    const T* __restrict x = p.x.data + i * p.x.stride, * __restrict u = p.update.data + i * p.update.stride;
    const T* __restrict g = grad + i * n;
    const auto t = [&](int64_t j) { return load(x[j]) + load(u[j]); };
    const Means<C> mean = project<T>(w, n, row, g, t, [](int64_t, C, C) {}, dweight, dbias);
    const C high = row.high, low = row.low, scale = row.scale;
    T* __restrict out = dx + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C normalised = ((t(j) - high) - low) * scale;
      store(&out[j], (load(g[j]) * w[j] - mean.d - normalised * mean.along) * scale);
    }
  }
}

template <typename T, typename C = compute_t<T>>
void backward(const ResidualNorm<T>& p, const T* __restrict grad, const RowStatistics<C>* statistics, int64_t begin,
              int64_t end, T* __restrict dx, T* __restrict dupdate, T* __restrict dsum, C* __restrict dweight,
              C* __restrict dbias, C* scratch) {
  const int64_t n = p.channels;
  const Row<C> v = rows_of<T>(scratch, n);
  C* __restrict d = scratch + 5 * n, * __restrict normalised = scratch + 6 * n;
  C* __restrict t = v.t, * __restrict a = v.a, * __restrict s = v.s, * __restrict r = v.r, * __restrict slope = v.slope;
  for (int64_t j = 0; j < n; j++) dweight[j] = 0, dbias[j] = 0;
  if (!p.candidate.data) return plain_backward<T>(p, grad, statistics, begin, end, dx, dweight, dbias, scratch);
  for (int64_t i = begin; i < end; i++) {
    mix<true>(p, i, v);
    RowStatistics<C> row{};
    if (statistics) {
      row = statistics[i];
    } else {  // works on a copy, so that t stays
      for (int64_t j = 0; j < n; j++) d[j] = t[j];
      row = centre(d, n, p.eps);
    }
    const C scale = row.scale;
    const auto before = [&](int64_t j) { return t[j]; };
    const auto keep = [&](int64_t j, C nj, C dj) { normalised[j] = nj, d[j] = dj; };
    const Means<C> mean = project<T>(p.weight, n, row, grad + i * n, before, keep, dweight, dbias);
    T* __restrict ox = dx + i * n;
    const T* __restrict x = p.x.data + i * p.x.stride;
    T* __restrict ou = dupdate + i * n, * __restrict os = dsum + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C dt = (d[j] - mean.d - normalised[j] * mean.along) * scale, ds = dt * s[j];
      store(&ox[j], dt * r[j]);
      store(&ou[j], ds * r[j] * (a[j] - load(x[j])));
      store(&os[j], ds * slope[j]);
    }
  }
}

}  // namespace

FASTASR_KERNELS(ResidualNormKernels, .forward = forward<T>, .backward = backward<T>, .widen = convert<T, compute_t<T>>)

}  // namespace fastasr::cpu
