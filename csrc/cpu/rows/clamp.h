// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

namespace fastasr::cpu {

template <typename T>
struct Bounds {
  compute_t<T> low, high;
};

// The steps around the product of a linear layer whose input and result are clamped: y = clamp(act(clamp(z, inner)),
// outer), and backward dz = grad act', 0 where z is outside `inner` or the activation outside `outer`. A NaN stays one,
// and a bound that is a NaN makes all elements NaN. With `halves`, half of the gradient of an element that equals one
// of two different finite bounds is its own, and all of a NaN's. Without, the former has it all, the latter none unless
// both bounds are infinite.
template <typename T>
struct ClampKernels {
  // n elements; y may be z, dz may be grad.
  void (*forward)(Bounds<T> inner, int activation, Bounds<T> outer, const T* z, T* y, int64_t n);
  void (*backward)(Bounds<T> inner, int activation, Bounds<T> outer, bool halves, const T* grad, const T* z, T* dz,
                   int64_t n);
};

}  // namespace fastasr::cpu
