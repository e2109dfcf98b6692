// SPDX-License-Identifier: Apache-2.0
#include "cpu/rows/linear_activation.h"

#include <algorithm>
#include <type_traits>

#include "cpu/math/activation.h"

namespace fastasr::cpu {
namespace {

constexpr int64_t kPiece = 1024;  // elements that stay in the first cache between two passes

template <typename T, typename C = compute_t<T>>
void forward(int activation, const T* z, T* y, int64_t n) {
  C piece[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t m = std::min(kPiece, n - i);
    put_activated(activation, y + i, piece, m, [&](C* values) {
      if (static_cast<const void*>(values) != static_cast<const void*>(z + i)) convert(z + i, values, m);
    });
  }
}

template <typename T, typename C = compute_t<T>>
void backward(int activation, const T* grad, const T* z, T* dz, C* dbias, int64_t rows, int64_t channels) {
  C values[kPiece], gradients[kPiece];
  if (dbias) std::fill_n(dbias, channels, C(0));
  for (int64_t row = 0; row < rows; row++)
    for (int64_t c = 0; c < channels; c += kPiece) {
      const int64_t m = std::min(kPiece, channels - c), i = row * channels + c;
      C* const sums = dbias ? dbias + c : nullptr;
      if constexpr (std::is_same_v<T, C>) {
        activation_gradients(activation, grad + i, z + i, dz + i, sums, m);
      } else {
        convert(z + i, values, m), convert(grad + i, gradients, m);
        activation_gradients(activation, gradients, values, gradients, sums, m);
        convert(gradients, dz + i, m);
      }
    }
}

template <typename T, typename C = compute_t<T>>
void gated_forward(int activation, const T* z, T* y, int64_t rows, int64_t channels) {
  C gate[kPiece];
  for (int64_t row = 0; row < rows; row++, z += 2 * channels, y += channels)
    for (int64_t c = 0; c < channels; c += kPiece) {
      const int64_t m = std::min(kPiece, channels - c);
      const T *a = z + c, *g = a + channels;
      T* out = y + c;
      convert(g, gate, m);
      activate(activation, gate, m);
#pragma omp simd
      for (int64_t j = 0; j < m; j++) store(&out[j], load(a[j]) * gate[j]);
    }
}

// d[j] = grad[j] factor[j], and its sum over the rows.
template <typename T, typename C>
FASTASR_INLINE void put_gradient(const T* grad, const C* factor, T* d, C* __restrict sums, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; j++) {
    const C v = static_cast<C>(load(grad[j])) * factor[j];
    store(&d[j], v);
    if (sums) sums[j] += v;
  }
}

template <typename T, typename C = compute_t<T>>
void gated_backward(int activation, const T* grad, const T* z, T* dz, C* dbias, int64_t rows, int64_t channels) {
  C gate[kPiece], slope[kPiece];
  if (dbias) std::fill_n(dbias, 2 * channels, C(0));
  for (int64_t row = 0; row < rows; row++, grad += channels, z += 2 * channels, dz += 2 * channels)
    for (int64_t c = 0; c < channels; c += kPiece) {
      const int64_t m = std::min(kPiece, channels - c);
      const T *a = z + c, *g = a + channels;
      C* const sums = dbias ? dbias + c : nullptr;
      convert(g, gate, m);
      activate_with_slope(activation, gate, slope, m);
#pragma omp simd
      for (int64_t j = 0; j < m; j++) slope[j] *= load(a[j]);
      put_gradient(grad + c, gate, dz + c, sums, m);
      put_gradient(grad + c, slope, dz + c + channels, sums ? sums + channels : nullptr, m);
    }
}

template <typename T, typename C = compute_t<T>>
void drop(DropoutRow row, int64_t column, int32_t threshold, double scale, const T* x, T* y, int64_t n) {
  const int32_t count = static_cast<int32_t>(n), first = static_cast<int32_t>(column);
  const C factor = static_cast<C>(scale);
#pragma omp simd
  for (int32_t j = 0; j < count; j++)
    store(&y[j], load(x[j]) * (dropout_bits(row, static_cast<uint32_t>(first + j)) >= threshold ? factor : C(0)));
}

}  // namespace

FASTASR_KERNELS(LinearActivationKernels, .forward = forward<T>, .backward = backward<T>,
                .gated_forward = gated_forward<T>, .gated_backward = gated_backward<T>, .drop = drop<T>)

}  // namespace fastasr::cpu
