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
    C* values = piece;
    if constexpr (std::is_same_v<T, C>) values = y + i;
    if (static_cast<const void*>(values) != static_cast<const void*>(z + i)) {
#pragma omp simd
      for (int64_t j = 0; j < m; j++) values[j] = load(z[i + j]);
    }
    activate(activation, values, m);
    if constexpr (!std::is_same_v<T, C>) {
#pragma omp simd
      for (int64_t j = 0; j < m; j++) store(&y[i + j], values[j]);
    }
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
#pragma omp simd
        for (int64_t j = 0; j < m; j++) values[j] = load(z[i + j]), gradients[j] = load(grad[i + j]);
        activation_gradients(activation, gradients, values, gradients, sums, m);
#pragma omp simd
        for (int64_t j = 0; j < m; j++) store(&dz[i + j], gradients[j]);
      }
    }
}

}  // namespace

FASTASR_KERNELS(LinearActivationKernels, .forward = forward<T>, .backward = backward<T>)

}  // namespace fastasr::cpu
