// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/clamp.h"

#include <algorithm>
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

template <typename T, typename C = compute_t<T>>
FASTASR_INLINE bool inside(const Bounds<T>& b, C x) {
  constexpr C kInfinity = std::numeric_limits<C>::infinity();
  return ((b.low == -kInfinity) & (b.high == kInfinity)) | ((x >= b.low) & (x <= b.high));
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

template <typename T, typename C = compute_t<T>>
void backward(Bounds<T> inner, int activation, Bounds<T> outer, const T* grad, const T* z, T* dz, int64_t n) {
  C values[kPiece], slopes[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = std::min(kPiece, n - i);
#pragma omp simd
    for (int64_t j = 0; j < m; j++) values[j] = clamped<T>(inner, load(z[i + j]));
    activate_with_slope(activation, values, slopes, m);
#pragma omp simd
    for (int64_t j = 0; j < m; j++) {
      const C slope = (inside<T>(outer, values[j]) ? load(grad[i + j]) : C(0)) * slopes[j];
      store(&dz[i + j], inside<T>(inner, load(z[i + j])) ? slope : C(0));
    }
  }
}

}  // namespace

FASTASR_KERNELS(ClampKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
