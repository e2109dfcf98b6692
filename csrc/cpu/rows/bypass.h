// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

namespace fastasr::cpu {

// Bypass: y = x_orig + (x - x_orig) scale, with scale repeated every `period` elements (C, or B*C for a scale per
// sequence). Backward: dx = g scale, dx_orig = g (1 - scale), dscale = sum over rows of g (x - x_orig).
template <typename T>
struct BypassKernels {
  void (*forward)(const T* x_orig, const T* x, const T* scale, T* y, int64_t rows, int64_t period);
  // dscale (period, overwritten) is the sum over these rows alone: the caller adds the parts of fixed row blocks in
  // order, so the result does not depend on the number of threads.
  void (*backward)(const T* grad, const T* x_orig, const T* x, const T* scale, T* dx_orig, T* dx, compute_t<T>* dscale,
                   int64_t rows, int64_t period);
};

}  // namespace fastasr::cpu
