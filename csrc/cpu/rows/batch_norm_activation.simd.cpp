// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/batch_norm_activation.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kColumns = 64;

template <typename T, typename C = compute_t<T>>
void combine(const ChannelSums<T>& p, double eps, int64_t begin, int64_t end, const ChannelStatistics<C>& of, C* mean,
             C* variance) {
  int64_t count = 0, first = p.blocks;
  for (int64_t k = p.blocks - 1; k >= 0; k--)
    if (p.seen[k]) count += p.seen[k], first = k;
  const double share = count ? 1 / static_cast<double>(count) : 0;
  const double unbiased = 1 / static_cast<double>(std::max<int64_t>(1, count - 1));
  for (int64_t c = begin; c < end; c += kColumns) {
    const int64_t n = std::min(kColumns, end - c);
    double origin[kColumns] = {}, rest[kColumns] = {}, squares[kColumns] = {};  // the mean is origin + rest
    if (count) {
      for (int64_t j = 0; j < n; j++) origin[j] = static_cast<double>(p.shift[first * p.channels + c + j]);
    }
    for (int64_t k = first; k < p.blocks; k++) {
      const double seen = static_cast<double>(p.seen[k]);
      if (seen == 0) continue;
      const C* __restrict shift = p.shift + k * p.channels + c;
      const double* __restrict s1 = p.s1 + k * p.channels + c;
#pragma omp simd
      for (int64_t j = 0; j < n; j++) rest[j] += seen * (static_cast<double>(shift[j]) - origin[j]) + s1[j];
    }
    for (int64_t j = 0; j < n; j++) rest[j] *= share;
    for (int64_t k = first; k < p.blocks; k++) {
      const double seen = static_cast<double>(p.seen[k]);
      if (seen == 0) continue;
      const C* __restrict shift = p.shift + k * p.channels + c;
      const double* __restrict s1 = p.s1 + k * p.channels + c;
      const double* __restrict s2 = p.s2 + k * p.channels + c;
#pragma omp simd
      for (int64_t j = 0; j < n; j++) {
        const double d = rest[j] - (static_cast<double>(shift[j]) - origin[j]);
        squares[j] += s2[j] + d * (seen * d - 2 * s1[j]);
      }
    }
    for (int64_t j = 0; j < n; j++) {
      const double square = squares[j] < 0 ? 0 : squares[j];  // keeps a NaN
      const C high = static_cast<C>(origin[j] + rest[j]);
      of.high[c + j] = mean[c + j] = high;
      of.low[c + j] = static_cast<C>((origin[j] - static_cast<double>(high)) + rest[j]);
      of.scale[c + j] = static_cast<C>(1 / std::sqrt(square * share + eps));
      of.share[c + j] = static_cast<C>(share);
      variance[c + j] = static_cast<C>(square * unbiased);
    }
  }
}

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void row_of_zeros(T* __restrict row, int64_t n) {
  for (int64_t j = 0; j < n; j++) store(&row[j], C(0));
}

// Computes z of a row.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void normalise(const BatchNormActivation<T>& p, int64_t row, C* __restrict z) {
  const T* __restrict x = p.x + row * p.channels;
  const C* __restrict high = p.of.high, * __restrict low = p.of.low, * __restrict scale = p.of.scale;
  const C* __restrict w = p.weight, * __restrict b = p.bias;
#pragma omp simd
  for (int64_t j = 0; j < p.channels; j++) z[j] = ((load(x[j]) - high[j]) - low[j]) * scale[j] * w[j] + b[j];
}

template <typename T, typename C = compute_t<T>>
void forward(const BatchNormActivation<T>& p, int64_t begin, int64_t end, T* y, C* scratch) {
  const int64_t n = p.channels;
  for (int64_t i = begin; i < end; i++) {
    if (p.hidden && p.hidden[i]) {
      row_of_zeros(y + i * n, n);
      continue;
    }
    put_activated(p.activation, y + i * n, scratch, n, [&](C* t) { normalise<T>(p, i, t); });
  }
}

// Computes q of a row, which may lie in `room`, and adds it to `sums` unless that is null.
template <typename T, typename C = compute_t<T>>
FASTASR_INLINE void gradient_of_z(const BatchNormActivation<T>& p, const T* grad, int64_t row, C* q, C* sums, C* room) {
  const int64_t n = p.channels;
  normalise<T>(p, row, q);
  activation_gradients<C>(p.activation, widened(grad + row * n, room, n), q, q, sums, n);
}

template <typename T, typename C = compute_t<T>>
void sums(const BatchNormActivation<T>& p, const T* grad, int64_t begin, int64_t end, T* dx, C* __restrict dweight,
          C* __restrict dbias, C* scratch) {
  const int64_t n = p.channels;
  const C* __restrict high = p.of.high, * __restrict low = p.of.low, * __restrict scale = p.of.scale;
  for (int64_t j = 0; j < n; j++) dweight[j] = 0, dbias[j] = 0;
  for (int64_t i = begin; i < end; i++) {
    if (p.hidden && p.hidden[i]) continue;
    C* __restrict q = scratch;
    if constexpr (std::is_same_v<T, C>) q = dx + i * n;
    gradient_of_z<T>(p, grad, i, q, dbias, scratch + n);
    const T* __restrict x = p.x + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) dweight[j] += q[j] * (((load(x[j]) - high[j]) - low[j]) * scale[j]);
  }
}

template <typename T, typename C = compute_t<T>>
void backward(const BatchNormActivation<T>& p, const T* grad, const C* __restrict dweight, const C* __restrict dbias,
              int64_t begin, int64_t end, T* dx, C* scratch) {
  const int64_t n = p.channels;
  const C* __restrict high = p.of.high, * __restrict low = p.of.low, * __restrict scale = p.of.scale;
  const C* __restrict w = p.weight, * __restrict share = p.of.share;
  for (int64_t i = begin; i < end; i++) {
    T* out = dx + i * n;
    if (p.hidden && p.hidden[i]) {
      row_of_zeros(out, n);
      continue;
    }
    const C* q = scratch;
    if constexpr (std::is_same_v<T, C>)
      q = out;
    else
      gradient_of_z<T, C>(p, grad, i, scratch, nullptr, scratch + n);
    const T* __restrict x = p.x + i * n;
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
      const C normal = ((load(x[j]) - high[j]) - low[j]) * scale[j];
      store(&out[j], (q[j] - (dbias[j] + normal * dweight[j]) * share[j]) * (scale[j] * w[j]));
    }
  }
}

}  // namespace

FASTASR_KERNELS(BatchNormActivationKernels, .combine = combine<T>, .forward = forward<T>, .sums = sums<T>,
                .backward = backward<T>)

}  // namespace fastasr::cpu
