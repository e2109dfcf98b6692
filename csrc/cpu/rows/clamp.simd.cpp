// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/clamp.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kPiece = 1024;  // elements that stay in the first cache between two passes

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE C clamped(const Bounds<T>& b, C x) {
  const C above = (x >= b.low) | (x != x) ? x : b.low;
  return (above <= b.high) | (above != above) ? above : b.high;
}

// Returns which part of the gradient of clamped(x) is the gradient of x.
template <typename T, bool Halves, typename C = compute_t<T>>
FASTASR_INLINE C passed(const Bounds<T>& b, C x) {
  constexpr C kInfinity = std::numeric_limits<C>::infinity();
  if constexpr (Halves) {
    const bool outside = (x < b.low) | (x > b.high);
    const bool at_one = ((x == b.low) | (x == b.high)) & (b.low < b.high) & (std::abs(x) < kInfinity);
    return outside ? C(0) : at_one ? C(0.5) : C(1);
  } else {
    return ((b.low == -kInfinity) & (b.high == kInfinity)) | ((x >= b.low) & (x <= b.high)) ? C(1) : C(0);
  }
}

template <typename T, typename C = compute_t<T>>
void forward(Bounds<T> inner, int activation, Bounds<T> outer, const T* z, T* y, int64_t n) {
  C values[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = std::min(kPiece, n - i);
#pragma omp simd
    for (int64_t j = 0; j < m; j++) values[j] = clamped<T>(inner, load(z[i + j]));
    activate(activation, values, m);
#pragma omp simd
    for (int64_t j = 0; j < m; j++) store(&y[i + j], clamped<T>(outer, values[j]));
  }
}

template <typename T, bool Halves, typename C = compute_t<T>>
void backward_by(Bounds<T> inner, int activation, Bounds<T> outer, const T* grad, const T* z, T* dz, int64_t n) {
  C values[kPiece], slopes[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = std::min(kPiece, n - i);
#pragma omp simd
    for (int64_t j = 0; j < m; j++) values[j] = clamped<T>(inner, load(z[i + j]));
    activate_with_slope(activation, values, slopes, m);
#pragma omp simd
    for (int64_t j = 0; j < m; j++) {
      T y;  // what equals a bound is the rounded y
      store(&y, values[j]);
      const C of_y = passed<T, Halves>(outer, Halves ? C(load(y)) : values[j]);
      const C of_z = passed<T, Halves>(inner, load(z[i + j]));
      const C slope = (of_y != C(0) ? of_y * load(grad[i + j]) : C(0)) * slopes[j];
      store(&dz[i + j], of_z != C(0) ? of_z * slope : C(0));
    }
  }
}

template <typename T>
void backward(Bounds<T> inner, int activation, Bounds<T> outer, bool halves, const T* grad, const T* z, T* dz,
              int64_t n) {
  (halves ? backward_by<T, true> : backward_by<T, false>)(inner, activation, outer, grad, z, dz, n);
}

}  // namespace

FASTASR_KERNELS(ClampKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
