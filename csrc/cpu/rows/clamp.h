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
// outer), and backward dz = grad act', 0 where z is outside `inner` or the activation outside `outer`. A bound itself
// is inside. A NaN stays one, and has gradient 0 unless both bounds are infinite; a bound that is a NaN makes all
// elements NaN.
template <typename T>
struct ClampKernels {
  // n elements; y may be z, dz may be grad.
  void (*forward)(Bounds<T> inner, int activation, Bounds<T> outer, const T* z, T* y, int64_t n);
  void (*backward)(Bounds<T> inner, int activation, Bounds<T> outer, const T* grad, const T* z, T* dz, int64_t n);
};

}  // namespace fastasr::cpu
