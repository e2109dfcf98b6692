// SPDX-License-Identifier: Apache-2.0
#include "cpu/attention/attention_rows.h"

#include <cmath>
#include <limits>

#include "cpu/math/activation.h"
#include "cpu/math/elementary.h"

// Sums run in 32 lanes, the same on every instruction set.
namespace fastasr::cpu {
namespace {

constexpr int kLanes = 32;

template <typename C>
C maximum(const C* __restrict s, int64_t n) {
  C lanes[kLanes];
  for (int l = 0; l < kLanes; l++) lanes[l] = -std::numeric_limits<C>::infinity();
  for (int64_t j = 0; j < n; j += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; l++) lanes[l] = s[j + l] > lanes[l] ? s[j + l] : lanes[l];
  }
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) lanes[l] = lanes[l + half] > lanes[l] ? lanes[l + half] : lanes[l];
  return lanes[0];
}

template <typename C>
C exponentials(C* __restrict s, int64_t n, C top) {
  C lanes[kLanes] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; l++) {
      const C e = exp_or_zero(s[j + l] - top);
      s[j + l] = e;
      lanes[l] += e;
    }
  }
  return sum_of_lanes(lanes);
}

template <typename C>
void fill_where(const uint8_t* __restrict hidden, C* __restrict s, int64_t n, C value) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) s[j] = hidden[j] ? value : s[j];
}

template <typename C>
void penalty(const C* __restrict s, C* __restrict ds, int64_t n, C size, C limit) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) ds[j] += s[j] > limit ? size : s[j] < -limit ? -size : C(0);
}

template <typename C>
void rescaled(C* __restrict total, const C* __restrict part, int64_t rows, int64_t n, const C* scale) {
  for (int64_t m = 0; m < rows; m++)
    for (int64_t j = m * n; j < (m + 1) * n; j += 16) {
#pragma omp simd
      for (int l = 0; l < 16; l++) total[j + l] = total[j + l] * scale[m] + part[j + l];
    }
}

template <typename C>
void add(C* __restrict total, const C* __restrict part, int64_t n) {
  for (int64_t j = 0; j < n; j += 16) {
#pragma omp simd
    for (int l = 0; l < 16; l++) total[j + l] += part[j + l];
  }
}

template <typename C>
void add_number(C* __restrict s, int64_t n, C number) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) s[j] += number;
}

template <typename C, typename S>
void add_scaled(S* __restrict total, const C* __restrict part, int64_t n, C scale) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) total[j] += static_cast<S>(scale * part[j]);
}

template <typename C>
void soft_cap(C* __restrict s, int64_t n, C cap) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) s[j] = cap * tanh(s[j] / cap);
}

template <typename C>
void soft_cap_gradient(const C* __restrict s, C* __restrict ds, int64_t n, C cap) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const C t = (s[j] < -cap ? -cap : s[j]) / cap;
    ds[j] *= 1 - t * t;
  }
}

template <typename C>
C sum(const C* __restrict s, int64_t n) {
  C lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; l++) lanes[l] += s[j + l];
  }
  for (int l = 0; j + l < n; l++) lanes[l] += s[j + l];
  return sum_of_lanes(lanes);
}

template <typename C>
C dot(const C* __restrict a, const C* __restrict b, int64_t n) {
  C lanes[kLanes] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; l++) lanes[l] += a[j + l] * b[j + l];
  }
  return sum_of_lanes(lanes);
}

// Computes s / sum as s inverse + s rest, where inverse + rest = 1 / sum to twice the precision: as exact as a
// division.
template <typename T>
void divided(const compute_t<T>* __restrict s, compute_t<T> sum, T* __restrict out, int64_t n) {
  using C = compute_t<T>;
  const C inverse = 1 / sum, rest = std::fma(-sum, inverse, C(1)) * inverse;
#pragma omp simd
  for (int64_t j = 0; j < n; j++) store(&out[j], s[j] * inverse + s[j] * rest);
}

template <typename T>
compute_t<T> equalised(compute_t<T>* __restrict w, compute_t<T> sum, int64_t n) {
  using C = compute_t<T>;
  const C inverse = 1 / sum, rest = std::fma(-sum, inverse, C(1)) * inverse;
  C lanes[kLanes] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; l++) {
      T rounded;
      store(&rounded, w[j + l] * inverse + w[j + l] * rest);
      w[j + l] = load(rounded) > 0 ? C(1) : C(0);
      lanes[l] += w[j + l];
    }
  }
  return sum_of_lanes(lanes);
}

template <typename C>
double wide_sum(const C (&lanes)[kLanes]) {
  double wide[kLanes];
  for (int l = 0; l < kLanes; l++) wide[l] = static_cast<double>(lanes[l]);
  return sum_of_lanes(wide);
}

// delta is divided by the sum of the weights as they were rounded, and subtracted in two parts: g then adds up to zero
// as nearly as its elements allow, which dS k relies on where keys have a mean.
template <typename C>
void attention_gradient(const C* __restrict w, C sum, C* __restrict g, int64_t n) {
  C along[kLanes] = {}, weight[kLanes] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; l++) along[l] += w[j + l] * g[j + l], weight[l] += w[j + l];
  }
  const C inverse = 1 / sum, rest = std::fma(-sum, inverse, C(1)) * inverse;
  const double total = wide_sum(weight), delta = total == 0 ? 0 : wide_sum(along) / total;
  const C high = static_cast<C>(delta), low = std::isfinite(high) ? static_cast<C>(delta - high) : C(0);
#pragma omp simd
  for (int64_t j = 0; j < n; j++) g[j] = (w[j] * inverse + w[j] * rest) * ((g[j] - high) - low);
}

template <typename C>
void drop(C* __restrict w, int64_t n, DropoutRow row, int64_t key, int32_t threshold, C scale) {
  const int32_t count = static_cast<int32_t>(n), first = static_cast<int32_t>(key);
#pragma omp simd
  for (int32_t j = 0; j < count; j++)
    w[j] *= dropout_bits(row, static_cast<uint32_t>(first + j)) >= threshold ? scale : C(0);
}

template <typename T>
void softmax_gradient(const T* __restrict w, const T* __restrict g, compute_t<T>* __restrict ds, int64_t n) {
  using C = compute_t<T>;
  C lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; l++) lanes[l] += load(w[j + l]) * load(g[j + l]);
  }
  for (int l = 0; j + l < n; l++) lanes[l] += load(w[j + l]) * load(g[j + l]);
  const C sum = sum_of_lanes(lanes);
#pragma omp simd
  for (int64_t i = 0; i < n; i++) ds[i] = load(w[i]) * (load(g[i]) - sum);
}

}  // namespace

FASTASR_KERNELS(AttentionRows, .fill_where = fill_where<compute_t<T>>, .maximum = maximum<compute_t<T>>,
                .exponentials = exponentials<compute_t<T>>, .rescaled = rescaled<compute_t<T>>,
                .add = add<compute_t<T>>, .add_number = add_number<compute_t<T>>,
                .add_scaled = add_scaled<compute_t<T>, compute_t<T>>, .add_to_double = add_scaled<compute_t<T>, double>,
                .soft_cap = soft_cap<compute_t<T>>, .soft_cap_gradient = soft_cap_gradient<compute_t<T>>,
                .sum = sum<compute_t<T>>, .dot = dot<compute_t<T>>,
                .attention_gradient = attention_gradient<compute_t<T>>, .drop = drop<compute_t<T>>,
                .penalty = penalty<compute_t<T>>, .equalised = equalised<T>, .divided = divided<T>,
                .softmax_gradient = softmax_gradient<T>)

}  // namespace fastasr::cpu
