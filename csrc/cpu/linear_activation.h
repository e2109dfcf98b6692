// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/number.h"

// What follows the product of a linear layer with an activation (cpu/activation.h): y = act(z), and backward
// dz = grad act'(z), dbias = the sum of dz over its rows.
namespace fastasr::cpu {

// forward: n elements; y may be z.
// backward: rows of `channels` elements; dz may be grad; dbias: their sum in the compute type (overwritten), or null.
#define FASTASR_DECLARE(T)                                                                                             \
  void linear_activation_forward(int activation, const T* z, T* y, int64_t n);                                         \
  void linear_activation_backward(int activation, const T* grad, const T* z, T* dz, compute_t<T>* dbias, int64_t rows, \
                                  int64_t channels);
FASTASR_DECLARE(float)
FASTASR_DECLARE(double)
FASTASR_DECLARE(bfloat16)
FASTASR_DECLARE(float16)
#undef FASTASR_DECLARE

}  // namespace fastasr::cpu
