// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/math/number.h"

// Mean and deviation of a row, for LayerNorm and RMSNorm, and the means that their gradients need.
namespace fastasr::cpu {

// (t - high) - low is t less its mean, which is exact to double; scale is 1 / sqrt(var + eps).
template <typename C>
struct RowStatistics {
  C high, low, scale;
};

// Returns t between -limit and limit; keeps a NaN.
template <typename C>
FASTASR_INLINE C limited(C t, C limit) {
  const C above = t < -limit ? -limit : t;
  return above > limit ? limit : above;
}

// Whether the gradient of t passes `limited`. That of a NaN passes where there is no limit, as in torch.clamp.
template <typename C>
FASTASR_INLINE bool passes(C t, C limit) {
  return (limit == std::numeric_limits<C>::infinity()) | ((t >= -limit) & (t <= limit));
}

// Computes sums over a row: 16 lanes add four terms each in the compute type, then go on in double. ESPnet's epsilon is
// 1e-12, so rows of almost equal elements are normalised by the rounding errors of their elements, and the sums must
// not add their own.
constexpr int64_t kRowLanes = 16, kRowChain = 4, kRowBlock = kRowLanes * kRowChain;

template <typename C, typename F>
FASTASR_INLINE double row_sum(int64_t n, const F& term) {
  alignas(64) double total[kRowLanes] = {};
  int64_t j = 0;
  for (; j + kRowBlock <= n; j += kRowBlock) {
    alignas(64) C part[kRowLanes] = {};
    for (int64_t k = 0; k < kRowChain; k++) {
#pragma omp simd
      for (int64_t l = 0; l < kRowLanes; l++) part[l] += term(j + k * kRowLanes + l);
    }
#pragma omp simd
    for (int64_t l = 0; l < kRowLanes; l++) total[l] += static_cast<double>(part[l]);
  }
  for (; j < n; j++) total[j % kRowLanes] += static_cast<double>(term(j));
  // adds the lanes by halves: one after another, the sixteen would take as long as a narrow row
  for (int64_t half = kRowLanes / 2; half; half /= 2) {
#pragma omp simd
    for (int64_t l = 0; l < half; l++) total[l] += total[l + half];
  }
  return total[0];
}

// Computes centred = t - mean(t), in place. The mean is subtracted in two parts, exact to double.
template <typename C>
static __attribute__((noinline)) RowStatistics<C> centre(C* __restrict t, int64_t n, double eps) {
  const double mean = row_sum<C>(n, [&](int64_t j) { return t[j]; }) / static_cast<double>(n);
  const C high = static_cast<C>(mean);
  C low = static_cast<C>(mean - static_cast<double>(high));
  if constexpr (sizeof(C) == sizeof(double))  // the sum above was rounded, so this is the rest of the mean
    low = row_sum<C>(n, [&](int64_t j) { return t[j] - high; }) / static_cast<C>(n);
#pragma omp simd
  for (int64_t j = 0; j < n; j++) t[j] = (t[j] - high) - low;
  const double square = row_sum<C>(n, [&](int64_t j) { return t[j] * t[j]; });
  return {high, low, static_cast<C>(1 / std::sqrt(square / static_cast<double>(n) + eps))};
}

// RMSNorm subtracts no mean: scale is 1 / sqrt(mean of t^2 + eps).
template <typename C>
FASTASR_INLINE RowStatistics<C> root_mean_square(const C* __restrict t, int64_t n, double eps) {
  const double square = row_sum<C>(n, [&](int64_t j) { return t[j] * t[j]; });
  return {0, 0, static_cast<C>(1 / std::sqrt(square / static_cast<double>(n) + eps))};
}

// Computes t = t - mean(t), or leaves t as it is if the norm is not centred.
template <typename P, typename C>
FASTASR_INLINE RowStatistics<C> statistics_of(const P& p, C* t) {
  return p.centred ? centre(t, p.channels, p.eps) : root_mean_square(t, p.channels, p.eps);
}

// Chains have kTerms terms in the compute type; they are then added in double.
constexpr int64_t kTerms = 256;

template <typename C>
struct Means {
  C d, along;  // of d and of d n
};

// With d = weight grad and n the normalised row, whose elements are t(j) before they are normalised: calls
// keep(j, n, d), adds to dweight and dbias, and returns the means.
template <typename T, typename F, typename K, typename C = compute_t<T>>
FASTASR_INLINE Means<C> project(const C* __restrict w, int64_t n, const RowStatistics<C>& row, const T* __restrict g,
                                const F& t, const K& keep, C* __restrict dweight, C* __restrict dbias) {
  const C high = row.high, low = row.low, scale = row.scale;
  double sum = 0, product = 0;
  for (int64_t first = 0; first < n; first += kTerms) {
    const int64_t last = first + kTerms < n ? first + kTerms : n;
    C a = 0, b = 0;
#pragma omp simd reduction(+ : a, b)
    for (int64_t j = first; j < last; j++) {
      const C gj = load(g[j]), nj = ((t(j) - high) - low) * scale, dj = gj * w[j];
      keep(j, nj, dj);
      dweight[j] += gj * nj;
      dbias[j] += gj;
      a += dj;
      b += dj * nj;
    }
    sum += static_cast<double>(a), product += static_cast<double>(b);
  }
  return {static_cast<C>(sum / static_cast<double>(n)), static_cast<C>(product / static_cast<double>(n))};
}

}  // namespace fastasr::cpu
