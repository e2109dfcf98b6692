// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

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
};

}  // namespace fastasr::cpu
