// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/add_norm.h"

namespace fastasr::cpu {
namespace {

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE C rounded(C value) {
  T stored;
  store(&stored, value);
  return load(stored);
}

// Writes update, or RMS(update) before its weight, to u. Returns 1 / rms, or 1.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE C normalised_update(const AddNorm<T>& p, int64_t row, C* __restrict u) {
  const int64_t n = p.channels;
  const T* __restrict update = p.update + row * n;
  if (!p.update_weight) {
    convert(update, u, n);
    return 1;
  }
  const C limit = p.update_limit;
#pragma omp simd
  for (int64_t j = 0; j < n; j++) u[j] = limited<C>(load(update[j]), limit);
  const C scale = root_mean_square(u, n, p.eps).scale;
#pragma omp simd
  for (int64_t j = 0; j < n; j++) u[j] *= scale;
  return scale;
}

// Computes t = x + scale u, rounded.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void add(const AddNorm<T>& p, int64_t row, const C* __restrict u, C* __restrict t) {
  const int64_t n = p.channels;
  const T* __restrict x = p.x + row * n;
  const C* __restrict w = p.update_weight;
  const C scale = p.scale;
  if (w) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) t[j] = rounded<T>(load(x[j]) + scale * (u[j] * w[j]));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) t[j] = rounded<T>(load(x[j]) + scale * u[j]);
  }
}

template <typename T, typename C = compute_t<T>>
void forward(const AddNorm<T>& p, int64_t begin, int64_t end, T* t, T* y, C* scratch) {
  const int64_t n = p.channels;
  C *u = scratch, *__restrict row = scratch + n;
  const C* __restrict w = p.weight, * __restrict b = p.bias;
  const C limit = p.limit;
  for (int64_t i = begin; i < end; i++) {
    normalised_update<T>(p, i, u);
    add<T>(p, i, u, row);
    T* __restrict sum = t + i * n, * __restrict out = y + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      store(&sum[j], row[j]);
      row[j] = limited<C>(row[j], limit);
    }
    const C scale = statistics_of(p, row).scale;
    if (b) {
#pragma omp simd
      for (int64_t j = 0; j < n; j++) store(&out[j], row[j] * scale * w[j] + b[j]);
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; j++) store(&out[j], row[j] * scale * w[j]);
    }
  }
}

template <typename T, typename C = compute_t<T>>
void backward(const AddNorm<T>& p, const T* grad_t, const T* grad_y, int64_t begin, int64_t end, T* dx, T* dupdate,
              C* __restrict dweight, C* __restrict dbias, C* __restrict dupdate_weight, C* scratch) {
  const int64_t n = p.channels;
  C* __restrict u = scratch, * __restrict t = scratch + n, * __restrict d = scratch + 2 * n;
  const C* __restrict w = p.weight, * __restrict uw = p.update_weight;
  const C limit = p.limit, update_limit = p.update_limit, factor = p.scale;
  for (int64_t j = 0; j < n; j++) dweight[j] = 0, dbias[j] = 0, dupdate_weight[j] = 0;
  for (int64_t i = begin; i < end; i++) {
    const C update_scale = normalised_update<T>(p, i, u);
    add<T>(p, i, u, t);
    const auto bounded = [&](int64_t j) __attribute__((always_inline)) { return limited<C>(t[j], limit); };
#pragma omp simd
    for (int64_t j = 0; j < n; j++) d[j] = bounded(j);
    const RowStatistics<C> row = statistics_of(p, d);
    const T* __restrict g = grad_y + i * n;
    Means<C> mean = project<T>(w, n, row, g, bounded, [](int64_t, C, C) {}, dweight, dbias);
    if (!p.centred) mean.d = 0;
    const C high = row.high, low = row.low, scale = row.scale;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C normalised = ((bounded(j) - high) - low) * scale;
      const C dt = (load(g[j]) * w[j] - mean.d - normalised * mean.along) * scale;
      d[j] = passes<C>(t[j], limit) ? dt : C(0);
    }
    if (grad_t) {
      const T* __restrict more = grad_t + i * n;
#pragma omp simd
      for (int64_t j = 0; j < n; j++) d[j] += load(more[j]);
    }
    T* __restrict ox = dx + i * n, * __restrict ou = dupdate + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) store(&ox[j], d[j]), d[j] *= factor;
    if (!uw) {
#pragma omp simd
      for (int64_t j = 0; j < n; j++) store(&ou[j], d[j]);
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      dupdate_weight[j] += d[j] * u[j];
      d[j] *= uw[j];
    }
    const C along = static_cast<C>(row_sum<C>(n, [&](int64_t j) { return d[j] * u[j]; }) / static_cast<double>(n));
    const T* __restrict update = p.update + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C df = (d[j] - u[j] * along) * update_scale;
      store(&ou[j], passes<C>(load(update[j]), update_limit) ? df : C(0));
    }
  }
}

}  // namespace

FASTASR_KERNELS(AddNormKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
