// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/simd/kernels.h"

// SwooshL(x) = log(1 + e^(x-4)) - 0.08 x - 0.035, SwooshR(x) = log(1 + e^(x-1)) - 0.08 x - 0.313261687;
// the derivative is sigmoid(x - a) - 0.08. The result may be multiplied by a dropout mask (already scaled by 1/(1-p)).
namespace fastasr::cpu {

enum class Swoosh { L, R };
enum class Mask { none, scalar, elementwise };

template <typename T>
struct SwooshKernels {
  // y[i] = swoosh(x[i]) * m[i], i in [0, n); m = 1, mask[0] or mask[i]. y may be x.
  void (*forward)(const T* x, const T* mask, Mask mask_kind, T* y, int64_t n, Swoosh kind);
  // dx[i] = grad[i] m[i] swoosh'(x[i]); y[i] = swoosh(x[i]) m[i] unless y is null. dx may be grad.
  void (*backward)(const T* grad, const T* x, const T* mask, Mask mask_kind, T* dx, T* y, int64_t n, Swoosh kind);
};

}  // namespace fastasr::cpu
