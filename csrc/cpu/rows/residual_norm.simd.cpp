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

// Chains have kTerms terms in the compute type; they are then added in double.
constexpr int64_t kTerms = 256;

// With d = weight grad and n the normalised row, adds to dweight and dbias and returns the means of d and d n. It
// serves the gated form, whose t is in the scratch: n replaces t, and d is kept.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void project(const C* __restrict w, int64_t n, const RowStatistics<C>& row, const T* __restrict g,
                            C* __restrict t, C* __restrict d, C* __restrict dweight, C* __restrict dbias, C* mean,
                            C* along) {
  const C high = row.high, low = row.low, scale = row.scale;
  double sum = 0, product = 0;
  for (int64_t first = 0; first < n; first += kTerms) {
    const int64_t last = first + kTerms < n ? first + kTerms : n;
    C a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t j = first; j < last; j++) {
      const C gj = load(g[j]), nj = ((t[j] - high) - low) * scale, dj = gj * w[j];
      t[j] = nj, d[j] = dj;
      dweight[j] += gj * nj;
      dbias[j] += gj;
      a += dj;
      b += dj * nj;
    }
    sum += static_cast<double>(a), product += static_cast<double>(b);
  }
  *mean = static_cast<C>(sum / static_cast<double>(n)), *along = static_cast<C>(product / static_cast<double>(n));
}

// Does the same for the plain form for up to four rows at once, so that dweight and dbias are read and written once for
// them. It keeps nothing else: reading x and update again is cheaper.
template <typename T, typename C>
struct PlainRow {
  const T *x, *u, *g;
  RowStatistics<C> with;
  double sum, product;
};

template <typename T, typename C>
FASTASR_INLINE C normalised(const PlainRow<T, C>& r, int64_t j) {
  return ((load(r.x[j]) + load(r.u[j]) - r.with.high) - r.with.low) * r.with.scale;
}

template <int kRows, typename T, typename C>
__attribute__((noinline)) void project_plain(const C* __restrict w, int64_t n, PlainRow<T, C>* rows,
                                             C* __restrict dweight, C* __restrict dbias) {
  const PlainRow<T, C> r0 = rows[0], r1 = rows[kRows > 1 ? 1 : 0], r2 = rows[kRows > 1 ? 2 : 0],
                       r3 = rows[kRows > 1 ? 3 : 0];
  for (int k = 0; k < kRows; k++) rows[k].sum = rows[k].product = 0;
  for (int64_t first = 0; first < n; first += kTerms) {
    const int64_t last = first + kTerms < n ? first + kTerms : n;
    C a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
#pragma omp simd reduction(+ : a0, a1, a2, a3, b0, b1, b2, b3)
    for (int64_t j = first; j < last; j++) {
      const C wj = w[j];
      C dw = dweight[j], db = dbias[j];
      const auto add = [&](const PlainRow<T, C>& r, C* a, C* b) __attribute__((always_inline)) {
        const C gj = load(r.g[j]), nj = normalised(r, j), dj = gj * wj;
        dw += gj * nj;
        db += gj;
        *a += dj;
        *b += dj * nj;
      };
      add(r0, &a0, &b0);
      if constexpr (kRows > 1) {
        add(r1, &a1, &b1);
        add(r2, &a2, &b2);
        add(r3, &a3, &b3);
      }
      dweight[j] = dw, dbias[j] = db;
    }
    rows[0].sum += static_cast<double>(a0), rows[0].product += static_cast<double>(b0);
    if constexpr (kRows > 1) {
      rows[1].sum += static_cast<double>(a1), rows[1].product += static_cast<double>(b1);
      rows[2].sum += static_cast<double>(a2), rows[2].product += static_cast<double>(b2);
      rows[3].sum += static_cast<double>(a3), rows[3].product += static_cast<double>(b3);
    }
  }
}

template <typename T, typename C = compute_t<T>>
void plain_backward(const ResidualNorm<T>& p, const T* grad, const RowStatistics<C>* statistics, int64_t begin,
                    int64_t end, T* dx, C* __restrict dweight, C* __restrict dbias, C* scratch) {
  const int64_t n = p.channels;
  const C* __restrict w = p.weight;
  for (int64_t i = begin; i < end;) {
    const int count = end - i >= 4 ? 4 : 1;
    PlainRow<T, C> rows[4];
    for (int k = 0; k < count; k++) {
      RowStatistics<C> with{};
      if (statistics) {
        with = statistics[i + k];
      } else {
        const Row<C> v = rows_of<T>(scratch, n);
        mix<false>(p, i + k, v);
        with = centre(v.t, n, p.eps);
      }
      rows[k] = {
          p.x.data + (i + k) * p.x.stride, p.update.data + (i + k) * p.update.stride, grad + (i + k) * n, with, 0, 0};
    }
    if (count == 4)
      project_plain<4>(w, n, rows, dweight, dbias);
    else
      project_plain<1>(w, n, rows, dweight, dbias);
    for (int k = 0; k < count; k++) {
      const PlainRow<T, C> r = rows[k];
      const C scale = r.with.scale, mean = static_cast<C>(r.sum / static_cast<double>(n)),
              along = static_cast<C>(r.product / static_cast<double>(n));
      T* __restrict out = dx + (i + k) * n;
#pragma omp simd
      for (int64_t j = 0; j < n; j++) store(&out[j], (load(r.g[j]) * w[j] - mean - normalised(r, j) * along) * scale);
    }
    i += count;
  }
}

template <typename T, typename C = compute_t<T>>
void backward(const ResidualNorm<T>& p, const T* __restrict grad, const RowStatistics<C>* statistics, int64_t begin,
              int64_t end, T* __restrict dx, T* __restrict dupdate, T* __restrict dsum, C* __restrict dweight,
              C* __restrict dbias, C* scratch) {
  const int64_t n = p.channels;
  const Row<C> v = rows_of<T>(scratch, n);
  C* __restrict d = scratch + 5 * n;
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
    C mean, along;
    project<T>(p.weight, n, row, grad + i * n, t, d, dweight, dbias, &mean, &along);
    T* __restrict ox = dx + i * n;
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

template <typename T, typename C = compute_t<T>>
void widen(const T* __restrict from, C* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) to[j] = load(from[j]);
}

}  // namespace

FASTASR_KERNELS(ResidualNormKernels, .forward = forward<T>, .backward = backward<T>, .widen = widen<T>)

}  // namespace fastasr::cpu
