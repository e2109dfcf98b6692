// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/attention/weights_dropout.h"
#include "cpu/simd/kernels.h"

namespace fastasr::cpu {

// The step after the product of a linear layer with an activation (cpu/math/activation.h): y = act(z), and backward dz
// = grad act'(z), dbias = the sum of dz over its rows. Gated, for z = (a, g): y = a act(g), dz = grad (act(g), a
// act'(g)).
template <typename T>
struct LinearActivationKernels {
  // n elements; y may be z.
  void (*forward)(int activation, const T* z, T* y, int64_t n);
  // Takes rows of `channels` elements. dz may be grad; dbias is their sum in the compute type (overwritten), or null.
  void (*backward)(int activation, const T* grad, const T* z, T* dz, compute_t<T>* dbias, int64_t rows,
                   int64_t channels);
  // The same for rows of 2 `channels` elements of z, dz and dbias, and `channels` of y and grad.
  void (*gated_forward)(int activation, const T* z, T* y, int64_t rows, int64_t channels);
  void (*gated_backward)(int activation, const T* grad, const T* z, T* dz, compute_t<T>* dbias, int64_t rows,
                         int64_t channels);
  // Multiplies n elements of a row, the first of which is in the column `column`, by `scale` where dropout keeps them,
  // else by 0. y may be x.
  void (*drop)(DropoutRow row, int64_t column, int32_t threshold, double scale, const T* x, T* y, int64_t n);
};

}  // namespace fastasr::cpu
